//! Matrix products of any strides on one thread: in f32 through the `gemm` crate, or of factors
//! rounded to bf16 by the kernel [`model_core::kernels::gemm::bf16`].
//!
//! [`Products`] says which. Operations are called by the graph, with nothing but tensors, so the choice belongs to the
//! thread: [`Products::scope`] makes it for the time that a closure runs.

use std::cell::{Cell, RefCell};

use gemm::Parallelism;
use model_core::kernels::gemm::bf16::{self, Scratch};
pub use model_core::kernels::gemm::bf16::{Mat, Write};
use model_core::kernels::isa::Bf16;

/// The numbers that matrix products multiply. Sums are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Products {
    /// The factors as they are.
    #[default]
    F32,
    /// The factors rounded to bf16: half the time, where the CPU has instructions for it.
    Bf16,
}

thread_local! {
    static BF16: Cell<Option<Bf16>> = const { Cell::new(None) };
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch::default());
}

impl Products {
    /// The fastest that this CPU has instructions for.
    pub fn fastest() -> Self {
        if Self::Bf16.is_available() { Self::Bf16 } else { Self::F32 }
    }

    /// Whether this CPU has instructions for it.
    pub fn is_available(self) -> bool {
        self == Self::F32 || Bf16::detect().is_some()
    }

    /// Those of the [`Products::scope`] around the call.
    pub fn current() -> Self {
        if BF16.get().is_some() { Self::Bf16 } else { Self::F32 }
    }

    /// Runs `work`, and with it every product that this thread makes meanwhile. What is not available is f32.
    pub fn scope<R>(self, work: impl FnOnce() -> R) -> R {
        /// Puts back what was there, also when `work` panics.
        struct Restore(Option<Bf16>);
        impl Drop for Restore {
            fn drop(&mut self) {
                BF16.set(self.0);
            }
        }
        let chosen = if self == Self::Bf16 { Bf16::detect() } else { None };
        let _restore = Restore(BF16.replace(chosen));
        work()
    }
}

/// `out (+)= scale * lhs rhs`, `out` row-major with rows `out_stride` apart, in the numbers of the [`Products::scope`]
/// around it, which are f32 without one.
///
/// # Panics
/// When the inner sizes differ or the last row of the product ends past `out`.
pub fn matmul(lhs: Mat<'_>, rhs: Mat<'_>, scale: f32, out: &mut [f32], out_stride: usize, write: Write) {
    match BF16.get() {
        None => matmul_f32(lhs, rhs, scale, out, out_stride, write),
        Some(bf16) => SCRATCH.with_borrow_mut(|scratch| {
            bf16::matmul(bf16, lhs, rhs, scale, out, out_stride, write, scratch);
        }),
    }
}

fn matmul_f32(lhs: Mat<'_>, rhs: Mat<'_>, scale: f32, out: &mut [f32], out_stride: usize, write: Write) {
    let (m, n, k) = (lhs.rows(), rhs.cols(), lhs.cols());
    assert_eq!(k, rhs.rows(), "inner sizes of a product differ");
    if m == 0 || n == 0 {
        return;
    }
    assert!(out_stride >= n && (m - 1) * out_stride + n <= out.len(), "product exceeds its output");
    let add = write == Write::Add;
    // SAFETY: `Mat` guarantees that every (row, col) of `lhs` and `rhs` lies in its slice (checked when built; `t`
    // swaps both sizes and strides), and the assertion above that every (row, col) of the m x n product lies in
    // `out`, whose rows do not overlap since `out_stride >= n`. `out` is borrowed mutably, so it aliases neither.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            out.as_mut_ptr(),
            1,
            out_stride as isize,
            add,
            lhs.data().as_ptr(),
            lhs.col_stride() as isize,
            lhs.row_stride() as isize,
            rhs.data().as_ptr(),
            rhs.col_stride() as isize,
            rhs.row_stride() as isize,
            1.0,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposed_and_accumulated_products_match_the_definition() {
        let (m, n, k) = (5, 7, 3);
        let a: Vec<f32> = (0..m * k).map(|i| (i as f32 * 0.7).sin()).collect();
        let b: Vec<f32> = (0..n * k).map(|i| (i as f32 * 1.3).cos()).collect();
        let mut out = vec![1.0; m * n];
        matmul(Mat::new(&a, m, k), Mat::new(&b, n, k).t(), 2.0, &mut out, n, Write::Add);
        for i in 0..m {
            for j in 0..n {
                let dot: f32 = (0..k).map(|l| a[i * k + l] * b[j * k + l]).sum();
                // Two roundings per term of a sum of k terms of magnitude at most 1.
                assert!((out[i * n + j] - (1.0 + 2.0 * dot)).abs() <= 4.0 * k as f32 * f32::EPSILON);
            }
        }
    }

    #[test]
    fn a_scope_chooses_for_its_thread_and_puts_back() {
        assert_eq!(Products::current(), Products::F32);
        Products::fastest().scope(|| {
            assert_eq!(Products::current(), Products::fastest());
            Products::F32.scope(|| assert_eq!(Products::current(), Products::F32));
            assert_eq!(Products::current(), Products::fastest());
            std::thread::scope(|scope| scope.spawn(|| assert_eq!(Products::current(), Products::F32)).join()).unwrap();
        });
        let panicked = std::panic::catch_unwind(|| Products::fastest().scope(|| panic!("inside")));
        assert!(panicked.is_err());
        assert_eq!(Products::current(), Products::F32);
    }

    /// Factors that bf16 holds give the same product in both numbers.
    #[test]
    fn what_bf16_holds_is_not_rounded() {
        let (m, n, k) = (9, 33, 70);
        let a: Vec<f32> = (0..m * k).map(|i| (i * 7919 % 255) as f32 - 127.0).collect();
        let b: Vec<f32> = (0..n * k).map(|i| (i * 31 % 3) as f32 - 1.0).collect();
        let product = |products: Products| {
            let mut out = vec![0.0; m * n];
            products.scope(|| matmul(Mat::new(&a, m, k), Mat::new(&b, n, k).t(), 0.5, &mut out, n, Write::Set));
            out
        };
        assert_eq!(product(Products::fastest()), product(Products::F32));
    }
}

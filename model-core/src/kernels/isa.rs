//! Which instruction set the kernels use: found once at run time, so one binary serves every CPU of an architecture.
//!
//! An [`Isa`] is a token: the only ways to get one are detection ([`Isa::available`], [`Isa::best`]) and
//! [`Isa::parse`], which checks detection. Holding one therefore proves that the CPU has those instructions, and that
//! is the fact every call of a `#[target_feature]` function in [`kernels`](super) leans on. Packed weights remember
//! the token that they were packed for; nothing dispatches by asking the CPU again.

use std::fmt;
use std::str::FromStr;

use super::KernelError;

/// The variable that forces an instruction set, for bisecting: `BVIT_ISA=scalar`.
pub const ISA_ENV: &str = "BVIT_ISA";

/// An instruction set that this CPU has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Isa(Kind);

/// What [`Isa`] dispatches on. Kept apart so that only this module can make an `Isa`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    /// The definitions, compiled for the baseline CPU.
    Scalar,
    /// AVX2 and FMA, e.g. Intel Haswell (2013).
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// Armv8.0 NEON, e.g. Cortex-A72 (Raspberry Pi 4).
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// NEON with the dot product extension, e.g. Cortex-A76 (Raspberry Pi 5).
    #[cfg(target_arch = "aarch64")]
    NeonDot,
}

impl Kind {
    /// Slowest first.
    const ALL: &'static [Self] = &[
        Self::Scalar,
        #[cfg(target_arch = "x86_64")]
        Self::Avx2,
        #[cfg(target_arch = "x86_64")]
        Self::Avx512,
        #[cfg(target_arch = "aarch64")]
        Self::Neon,
        #[cfg(target_arch = "aarch64")]
        Self::NeonDot,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => "avx512",
            #[cfg(target_arch = "aarch64")]
            Self::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => "neon-dotprod",
        }
    }

    fn detected(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.detected()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(target_arch = "aarch64")]
            Self::Neon => std::arch::is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot => Self::Neon.detected() && std::arch::is_aarch64_feature_detected!("dotprod"),
        }
    }
}

impl Isa {
    /// The definitions themselves; every CPU has it.
    pub const SCALAR: Self = Self(Kind::Scalar);

    /// All instruction sets of this CPU that kernels are written for, slowest first; never empty.
    pub fn available() -> impl DoubleEndedIterator<Item = Self> {
        Kind::ALL.iter().filter(|kind| kind.detected()).map(|&kind| Self(kind))
    }

    pub fn best() -> Self {
        Self::available().next_back().unwrap_or(Self::SCALAR)
    }

    /// What [`ISA_ENV`] asks for, or [`Isa::best`] when it is unset or empty. The one place that reads it.
    ///
    /// # Errors
    /// [`KernelError::IsaUnavailable`] when it names one that this CPU (or this build) does not have.
    pub fn from_env() -> Result<Self, KernelError> {
        match std::env::var(ISA_ENV) {
            Ok(name) if !name.is_empty() => Self::parse(&name),
            _ => Ok(Self::best()),
        }
    }

    /// The instruction set called `name`, if this CPU has it.
    ///
    /// # Errors
    /// [`KernelError::IsaUnavailable`] otherwise, listing the names there are.
    pub fn parse(name: &str) -> Result<Self, KernelError> {
        Self::available().find(|isa| isa.name() == name).ok_or_else(|| KernelError::IsaUnavailable {
            asked: name.to_owned(),
            available: Self::available().map(Self::name).collect::<Vec<_>>().join(", "),
        })
    }

    /// `scalar`, `avx2`, `avx512`, `neon` or `neon-dotprod`: for logs, metrics and [`ISA_ENV`].
    pub fn name(self) -> &'static str {
        self.0.name()
    }

    pub(super) fn kind(self) -> Kind {
        self.0
    }
}

/// The proof that this CPU multiplies bf16 numbers, 32 pairs in an instruction: AVX-512 with its bf16
/// extension. Only [`Bf16::detect`] makes one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bf16(());

impl Bf16 {
    /// Nothing on a CPU without, e.g. AMD before Zen 4, Intel before Cooper Lake, Arm.
    pub fn detect() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if Kind::Avx512.detected() && is_x86_feature_detected!("avx512bf16") {
            return Some(Self(()));
        }
        None
    }
}

impl Default for Isa {
    fn default() -> Self {
        Self::best()
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = KernelError;

    fn from_str(name: &str) -> Result<Self, KernelError> {
        Self::parse(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A skipped instruction set passes every test silently, so CI names those
    /// that must run: `REQUIRE_ISA=scalar,avx2`.
    #[test]
    fn required_isas_are_available() {
        let names: Vec<_> = Isa::available().map(Isa::name).collect();
        println!("kernels tested: {}", names.join(", "));
        for name in std::env::var("REQUIRE_ISA").unwrap_or_default().split(',').filter(|name| !name.is_empty()) {
            assert!(names.contains(&name), "REQUIRE_ISA names `{name}`, but this CPU has only {names:?}");
        }
    }

    #[test]
    fn names_parse_back_and_unknown_ones_are_refused() {
        for isa in Isa::available() {
            assert_eq!(isa.name().parse(), Ok(isa));
        }
        assert!(Isa::parse("mmx").unwrap_err().to_string().contains("scalar"));
    }
}

//! What the process tells the system about its memory: two calls that no library wraps.

/// Blocks of this size and above are mapped by themselves and go back to the system when they are freed. Left alone, glibc
/// raises the size when the first photo is freed, and later ones stay in a heap per thread that does not shrink:
/// `loadtests/load.py photos` shows a third more at the peak.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const MAPPED_BYTES: std::ffi::c_int = 128 << 10;

/// Returns whether the setting was taken, or there is none to make. Other C libraries have other allocators.
#[allow(unsafe_code, reason = "no library wraps mallopt")]
pub fn give_back_large_blocks() -> bool {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt takes two numbers, may be called at any time by any thread, and locks the heap itself.
    return unsafe { libc::mallopt(libc::M_MMAP_THRESHOLD, MAPPED_BYTES) } == 1;
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    true
}

/// Bytes of the program's file, by [`included!`](crate::included).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Included(&'static [u8]);

/// A file that is part of the program. A constant is computed by the compiler, so no memory of the running program is one.
pub trait Constant {
    const BYTES: &'static [u8];
}

/// The file at that path as [`Included`](crate::pages::Included).
#[macro_export]
macro_rules! included {
    ($path:literal) => {{
        struct File;
        impl $crate::pages::Constant for File {
            const BYTES: &'static [u8] = include_bytes!($path);
        }
        $crate::pages::Included::of::<File>()
    }};
}

/// A multiple of every page size of Linux.
#[cfg(target_os = "linux")]
const LARGEST_PAGE: usize = 64 << 10;

impl Included {
    pub const fn of<C: Constant>() -> Self {
        Self(C::BYTES)
    }

    pub fn bytes(self) -> &'static [u8] {
        self.0
    }

    /// Takes the bytes out of memory; who reads them again waits for the disk. Models are packed when they are loaded, and
    /// their files are of no use after that.
    #[allow(unsafe_code, reason = "no library wraps madvise with a safe function")]
    pub fn give_back(self) {
        #[cfg(target_os = "linux")]
        {
            // SAFETY: asks for a number.
            let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(LARGEST_PAGE);
            // The pages that hold nothing else.
            let begin = self.0.as_ptr().align_offset(page).min(self.0.len());
            let len = (self.0.len() - begin) / page * page;
            let address = self.0[begin..].as_ptr().cast_mut().cast();
            // SAFETY: a constant lies in the program's file, which is mapped and never written; what is read after the call is
            // read from the file, and is the same.
            unsafe { libc::madvise(address, len, libc::MADV_DONTNEED) };
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_was_given_back_reads_the_same() {
        let file = included!("../../models/default-backbone.safetensors");
        let before = file.bytes().to_vec();
        file.give_back();
        assert!(before.len() > 1 << 16 && file.bytes() == before);
        crate::pages::Included::default().give_back();
    }
}

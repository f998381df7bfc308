//! The one setting of the C library's allocator.

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

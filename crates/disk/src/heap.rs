//! Keeping the C library's heap small.

/// Arenas of the heap: two threads allocate at a time without waiting for each other.
#[cfg(target_env = "gnu")]
const ARENAS_MAX: libc::c_int = 2;

/// Bytes from which a buffer has pages of its own: segments, not frames.
#[cfg(target_env = "gnu")]
const OWN_PAGES_LEN: libc::c_int = 4 << 20;

/// Free bytes at the end of an arena that stay there. A page that was given back is a fault, a page to clear and a lock
/// of the whole process when it is wanted again.
#[cfg(target_env = "gnu")]
const KEPT_LEN: libc::c_int = 8 << 20;

/// Has all threads share a few arenas and gives large buffers back at once, to be called first thing in `main`.
///
/// Buffers of frames are made by one thread and freed by another, and each arena keeps what was freed in it: with an
/// arena for each thread, and segments in them, a service holds several times the memory that its bounds speak of.
/// Elsewhere than with the GNU C library nothing happens.
pub fn keep_small() {
    #[cfg(target_env = "gnu")]
    #[allow(unsafe_code)]
    // SAFETY: sets numbers in the allocator, under its own lock; a refusal changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX);
        libc::mallopt(libc::M_MMAP_THRESHOLD, OWN_PAGES_LEN);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_LEN);
    }
}

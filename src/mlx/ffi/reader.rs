//! Weight files that were opened elsewhere, for MLX to read: it takes the header from memory, so that nobody
//! touches the file until a tensor is evaluated, and then its own threads read. What cannot be read is noted
//! and becomes zeros: MLX would tell whoever next waits for any of its streams.

use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use mlx_rs::error::{Exception, Result};
use mlx_rs::{Array, Stream};

/// The first read that failed, of all files that share it.
pub(crate) type ReadFailure = Arc<OnceLock<String>>;

/// An open safetensors file.
pub(crate) struct TensorFile {
    /// The file.
    pub(crate) file: File,
    /// Its beginning: the header and the 8 bytes of its length, which were checked.
    pub(crate) head: Vec<u8>,
    /// Its size.
    pub(crate) bytes: u64,
    /// Its name, for errors.
    pub(crate) name: String,
}

/// What MLX reads from.
struct Source {
    from: TensorFile,
    label: CString,
    /// Place of the next sequential read; only the header is read so.
    at: AtomicUsize,
    failure: ReadFailure,
}

/// While this is locked, files with "stuck" in their names are not read, as on a file system that hangs.
#[cfg(test)]
pub(crate) static STUCK: std::sync::Mutex<()> = std::sync::Mutex::new(());

impl Source {
    /// # Safety
    /// `data` must be valid for `n` bytes.
    unsafe fn head(&self, data: *mut c_char, n: usize) -> usize {
        let at = self.at.load(Ordering::Relaxed);
        let Some(part) = at.checked_add(n).and_then(|end| self.from.head.get(at..end)) else { return 0 };
        // SAFETY: `data` is valid for `n` bytes by contract, and `part` has as many.
        unsafe { ptr::copy_nonoverlapping(part.as_ptr(), data.cast(), n) };
        self.at.store(at + n, Ordering::Relaxed);
        n
    }

    /// # Safety
    /// `data` must be valid for `n` bytes.
    unsafe fn tensor(&self, data: *mut c_char, n: usize, place: usize) -> usize {
        #[cfg(test)]
        if self.from.name.contains("stuck") {
            drop(STUCK.lock());
        }
        let mut done = 0;
        while done < n {
            let Ok(place) = libc::off_t::try_from(place + done) else { break };
            // SAFETY: `data` is valid for `n` bytes by contract, and `done` is less.
            let read =
                unsafe { libc::pread(self.from.file.as_raw_fd(), data.add(done).cast(), n - done, place) };
            match usize::try_from(read) {
                Ok(0) => break,
                Ok(read) => done += read,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        self.fail(&error.to_string());
                        break;
                    }
                }
            }
        }
        if done < n {
            self.fail("it ended within a tensor");
            // SAFETY: the rest of the memory that is valid by contract.
            unsafe { ptr::write_bytes(data.add(done), 0, n - done) };
        }
        n
    }

    fn fail(&self, why: &str) {
        let _ = self.failure.set(format!("{} was not read: {why}", self.from.name));
    }
}

/// # Safety
/// `source` must be what [`load_safetensors`] gave to MLX, and not yet released.
unsafe fn source<'a>(source: *mut c_void) -> &'a Source {
    // SAFETY: by contract. It is shared only: MLX reads from several threads.
    unsafe { &*source.cast::<Source>() }
}

extern "C" fn is_open(_: *mut c_void) -> bool {
    true
}

unsafe extern "C" fn tell(this: *mut c_void) -> usize {
    // SAFETY: MLX passes what it was given.
    unsafe { source(this) }.at.load(Ordering::Relaxed)
}

unsafe extern "C" fn seek(this: *mut c_void, offset: i64, whence: c_int) -> c_int {
    // SAFETY: MLX passes what it was given.
    let source = unsafe { source(this) };
    let base = match whence {
        libc::SEEK_SET => 0,
        libc::SEEK_CUR => source.at.load(Ordering::Relaxed),
        libc::SEEK_END => usize::try_from(source.from.bytes).unwrap_or(usize::MAX),
        _ => return -1,
    };
    let to = isize::try_from(offset).ok().and_then(|offset| base.checked_add_signed(offset));
    to.map_or(-1, |to| {
        source.at.store(to, Ordering::Relaxed);
        0
    })
}

unsafe extern "C" fn read(this: *mut c_void, data: *mut c_char, n: usize) -> usize {
    // SAFETY: MLX passes what it was given, and memory of `n` bytes.
    unsafe { source(this).head(data, n) }
}

unsafe extern "C" fn read_at(this: *mut c_void, data: *mut c_char, n: usize, place: usize) -> usize {
    // SAFETY: MLX passes what it was given, and memory of `n` bytes.
    unsafe { source(this).tensor(data, n, place) }
}

extern "C" fn write(_: *mut c_void, _: *const c_char, _: usize) -> usize {
    0
}

unsafe extern "C" fn label_text(this: *mut c_void) -> *const c_char {
    // SAFETY: MLX passes what it was given; the text lives as long.
    unsafe { source(this) }.label.as_ptr()
}

unsafe extern "C" fn release(this: *mut c_void) {
    // SAFETY: it was made by `Box::into_raw`, and MLX releases it once, with the last of its arrays.
    drop(unsafe { Box::from_raw(this.cast::<Source>()) });
}

/// Returns the tensors of a file, which are read when they are evaluated, on the stream `on`. `failure` tells
/// whether all could be read, once they are available.
pub(crate) fn load_safetensors(
    from: TensorFile,
    failure: &ReadFailure,
    on: &Stream,
) -> Result<HashMap<String, Array>> {
    let label = CString::new(from.name.clone()).unwrap_or_default();
    let source = Source { from, label, at: AtomicUsize::new(0), failure: Arc::clone(failure) };
    let table = mlx_sys::mlx_io_vtable {
        is_open: Some(is_open),
        good: Some(is_open),
        tell: Some(tell),
        seek: Some(seek),
        read: Some(read),
        read_at_offset: Some(read_at),
        write: Some(write),
        label: Some(label_text),
        free: Some(release),
    };
    // SAFETY: every handle is made here and freed once; the arrays keep what they need of them. The source
    // belongs to the reader, which releases it.
    unsafe {
        let reader = mlx_sys::mlx_io_reader_new(Box::into_raw(Box::new(source)).cast(), table);
        let mut tensors = mlx_sys::mlx_map_string_to_array_new();
        let mut metadata = mlx_sys::mlx_map_string_to_string_new();
        let (to, beside) = (&raw mut tensors, &raw mut metadata);
        let status = mlx_sys::mlx_load_safetensors_reader(to, beside, reader, on.as_ptr());
        let found = if status == 0 {
            entries(tensors)
        } else {
            Err(Exception::custom("MLX refused the header of a weight file"))
        };
        mlx_sys::mlx_io_reader_free(reader);
        mlx_sys::mlx_map_string_to_string_free(metadata);
        mlx_sys::mlx_map_string_to_array_free(tensors);
        found
    }
}

/// # Safety
/// `map` must be a live handle.
unsafe fn entries(map: mlx_sys::mlx_map_string_to_array) -> Result<HashMap<String, Array>> {
    let mut found = HashMap::new();
    // SAFETY: `map` is live by contract and outlives the iterator; a key is copied before the next step, and
    // every array handle is filled by the iterator, or freed.
    unsafe {
        let iterator = mlx_sys::mlx_map_string_to_array_iterator_new(map);
        let status = loop {
            let (mut key, mut array) = (ptr::null(), super::Handle::new());
            let status =
                mlx_sys::mlx_map_string_to_array_iterator_next(&raw mut key, &raw mut array.0, iterator);
            if status != 0 || key.is_null() {
                break status;
            }
            let name = CStr::from_ptr(key).to_string_lossy().into_owned();
            found.insert(name, array.take(status, "an entry of a map")?);
        };
        mlx_sys::mlx_map_string_to_array_iterator_free(iterator);
        // 2 is the end.
        if status == 2 { Ok(found) } else { Err(Exception::custom("MLX does not list a file's tensors")) }
    }
}

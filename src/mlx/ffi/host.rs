//! Arrays whose bytes any thread may read, and arrays made of bytes on any thread.

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;

use mlx_rs::error::{Exception, Result};
use mlx_rs::{Array, Dtype};

use super::Handle;

/// Arrays that are there, row by row in memory.
#[derive(Debug)]
pub(crate) struct HostArrays {
    arrays: Vec<Array>,
    /// Where their bytes are; 0 where MLX does not tell.
    places: OnceLock<Vec<usize>>,
}

// SAFETY: handles are moved between threads as mlx-rs allows. Shared, they are only cloned, which counts
// references atomically, and asked for facts that are fixed once an array is there. The question for the
// bytes can move them, on a GPU with memory of its own: it is asked once, behind the lock of `places`, and
// nobody is given a handle before.
unsafe impl Sync for HostArrays {}

impl HostArrays {
    /// Waits for arrays that no computation will change.
    ///
    /// # Errors
    /// An array was not computed, or is not one block of rows.
    pub(crate) fn new(arrays: Vec<Array>) -> Result<Self> {
        for array in &arrays {
            array.eval()?;
            if !is_row_contiguous(array)? {
                return Err(Exception::custom("an array of a parked cache is not one block"));
            }
        }
        Ok(Self { arrays, places: OnceLock::new() })
    }

    fn places(&self) -> &[usize] {
        self.places.get_or_init(|| self.arrays.iter().map(place).collect())
    }

    /// Returns handles of the arrays, whose bytes no longer move.
    pub(crate) fn handles(&self) -> Vec<Array> {
        self.places();
        self.arrays.clone()
    }

    /// Returns the shape and type of each.
    pub(crate) fn shapes(&self) -> impl Iterator<Item = (&[i32], Dtype)> {
        self.arrays.iter().map(|array| (array.shape(), array.dtype()))
    }

    /// Returns the bytes of each.
    pub(crate) fn bytes(&self) -> Result<Vec<&[u8]>> {
        let slice = |(array, &place): (&Array, &usize)| match (array.nbytes(), place) {
            (0, _) => Ok(&[][..]),
            (_, 0) => Err(Exception::custom("MLX does not show an array's bytes")),
            // SAFETY: MLX said that these bytes are there. They live as long as the array, which is borrowed,
            // and do not change: whoever has another handle of it never updates it in place.
            (bytes, place) => Ok(unsafe { std::slice::from_raw_parts(place as *const u8, bytes) }),
        };
        self.arrays.iter().zip(self.places()).map(slice).collect()
    }
}

fn is_row_contiguous(array: &Array) -> Result<bool> {
    let mut is_so = false;
    // SAFETY: the array lives through the call, and the out-pointer is to a local.
    let status = unsafe { mlx_sys::_mlx_array_is_row_contiguous(&raw mut is_so, array.as_ptr()) };
    if status == 0 { Ok(is_so) } else { Err(Exception::custom("MLX does not tell how an array lies")) }
}

fn place(array: &Array) -> usize {
    // SAFETY: the array is there and lives through the call; the type of elements only types the pointer.
    unsafe { mlx_sys::mlx_array_data_uint8(array.as_ptr()) as usize }
}

/// Returns an array with a copy of bytes.
///
/// # Errors
/// They are not as many as the shape says, or there is no memory for them.
pub(crate) fn array_of(bytes: &[u8], shape: &[i32], dtype: Dtype) -> Result<Array> {
    let mut sizes = shape.iter().map(|&size| usize::try_from(size).ok());
    let elements = sizes.try_fold(1_usize, |product, size| product.checked_mul(size?));
    if elements.and_then(|elements| elements.checked_mul(item_bytes(dtype)?)) != Some(bytes.len()) {
        return Err(Exception::custom(format!("{} bytes for an array of {shape:?}", bytes.len())));
    }
    let dimensions = c_int::try_from(shape.len()).map_err(|_| Exception::custom("too many dimensions"))?;
    // SAFETY: the bytes are as many as the shape says, and are copied in the call.
    let made = Handle(unsafe {
        mlx_sys::mlx_array_new_data(bytes.as_ptr().cast::<c_void>(), shape.as_ptr(), dimensions, dtype.into())
    });
    let status = c_int::from(made.0.ctx.is_null());
    made.take(status, "an array of these bytes")
}

/// Returns the bytes of an element that caches have.
fn item_bytes(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::Float32 => Some(4),
        Dtype::Float16 | Dtype::Bfloat16 => Some(2),
        Dtype::Int8 => Some(1),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_become_an_array_and_bytes_again_on_another_thread() {
        let bytes: Vec<u8> = (0..24).collect();
        let arrays = std::thread::scope(|scope| {
            let build = || array_of(&bytes, &[1, 2, 3], Dtype::Float32).unwrap();
            scope.spawn(build).join().unwrap()
        });
        let shared = HostArrays::new(vec![arrays]).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| assert_eq!(shared.bytes().unwrap(), [&bytes[..]]));
            }
        });
        assert_eq!(shared.handles()[0].shape(), [1, 2, 3]);
    }

    #[test]
    fn bytes_that_do_not_fit_a_shape_are_refused() {
        assert!(array_of(&[0; 23], &[1, 2, 3], Dtype::Float32).is_err());
        assert!(array_of(&[0; 24], &[-1, -2, 3], Dtype::Float32).is_err());
        assert!(array_of(&[0; 4], &[i32::MAX, i32::MAX, i32::MAX], Dtype::Int8).is_err());
        assert!(array_of(&[], &[], Dtype::Int8).is_err());
    }

    #[test]
    fn an_array_that_is_not_one_block_of_rows_is_refused() {
        let bytes: Vec<u8> = (0..24).collect();
        let array = array_of(&bytes, &[2, 3], Dtype::Float32).unwrap();
        assert!(HostArrays::new(vec![array.transpose_axes(&[1, 0]).unwrap()]).is_err());
    }
}

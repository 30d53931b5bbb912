//! The one place that calls C itself: the parts of mlx-c that mlx-rs 0.33 does not wrap, and operations of
//! our own.
#![allow(unsafe_code, reason = "mlx-c is a C interface; mlx-rs has no wrapper for these")]

mod cuda;
mod host;
mod memory;
mod native;
mod quantized;
mod reader;

use std::ffi::{CStr, CString, c_int};
use std::ptr;

use mlx_rs::error::{Exception, Result};
use mlx_rs::{Array, Stream};
use mlx_sys::mlx_array;

pub(crate) use cuda::{CudaKernel, CudaLaunch, on_cuda};
pub(crate) use host::{HostArrays, array_of};
pub(crate) use memory::{address_limit, available, trim_heap, wired_limit_bytes};
pub(crate) use native::{
    AttentionShape, AttentionSpan, AttentionWeights, Gate, HEAD_DIM_MAX, HEAD_DIM_MULTIPLE, Kernels,
    instruction_set, instruction_sets, leave_products_to_blas, limit_threads, use_instruction_set, zeros,
};
pub(crate) use quantized::{Packed, quantize};
#[cfg(test)]
pub(crate) use reader::STUCK;
pub(crate) use reader::{ReadFailure, TensorFile, load_safetensors};

/// A fact of a device that MLX reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DeviceFact {
    /// A size in bytes or a count.
    Size(u64),
    /// A name.
    Text(String),
}

/// Returns a fact of the default device, such as "device_name" or "memory_size"; None if MLX does not know
/// it.
pub(crate) fn device_fact(key: &str) -> Option<DeviceFact> {
    let key = CString::new(key).ok()?;
    // SAFETY: every handle is made by mlx-c, used on this thread only and freed once; `key` outlives the
    // calls; a string result belongs to `info` and is copied before `info` is freed.
    unsafe {
        let mut device = mlx_sys::mlx_device_new();
        mlx_sys::mlx_get_default_device(&raw mut device);
        let mut info = mlx_sys::mlx_device_info_new();
        let fact = if mlx_sys::mlx_device_info_get(&raw mut info, device) == 0 {
            read_fact(info, &key)
        } else {
            None
        };
        mlx_sys::mlx_device_info_free(info);
        mlx_sys::mlx_device_free(device);
        fact
    }
}

/// Returns whether an array that is being evaluated is there.
pub(crate) fn is_available(array: &Array) -> Result<bool> {
    let mut available = false;
    // SAFETY: the array lives through the call, and the out-pointer is to a local.
    let status = unsafe { mlx_sys::_mlx_array_is_available(&raw mut available, array.as_ptr()) };
    if status == 0 {
        Ok(available)
    } else {
        Err(Exception::custom("MLX does not tell whether an array is there"))
    }
}

/// Waits for what a stream still evaluates; fails if something of it failed.
pub(crate) fn synchronize(stream: &Stream) -> Result<()> {
    // SAFETY: the stream lives through the call.
    let status = unsafe { mlx_sys::mlx_synchronize(stream.as_ptr()) };
    if status == 0 { Ok(()) } else { Err(Exception::custom("an evaluation failed; MLX says no more")) }
}

/// # Safety
/// `info` must be a live handle.
unsafe fn read_fact(info: mlx_sys::mlx_device_info, key: &CStr) -> Option<DeviceFact> {
    let (mut exists, mut is_text) = (false, false);
    // SAFETY: `info` is live by contract, the out-pointers are to locals, and the text is copied at once.
    unsafe {
        mlx_sys::mlx_device_info_has_key(&raw mut exists, info, key.as_ptr());
        if !exists {
            return None;
        }
        mlx_sys::mlx_device_info_is_string(&raw mut is_text, info, key.as_ptr());
        if is_text {
            let mut text = ptr::null();
            let status = mlx_sys::mlx_device_info_get_string(&raw mut text, info, key.as_ptr());
            let known = status == 0 && !text.is_null();
            return known.then(|| DeviceFact::Text(CStr::from_ptr(text).to_string_lossy().into_owned()));
        }
        let mut size = 0;
        let status = mlx_sys::mlx_device_info_get_size(&raw mut size, info, key.as_ptr());
        (status == 0).then_some(DeviceFact::Size(size as u64))
    }
}

/// Variables that MLX reads on CUDA. Its check of graph caches ends a program with many shapes of steps;
/// cuDNN plans attention anew for every length of a prompt, in 20 ms and more; and with short graphs the GPU
/// begins while the host still builds the rest of the step (an 8B at 4 bits on an H200: 200 tokens/s; with
/// MLX's default, 170).
const SETTINGS: [(&str, &str); 4] = [
    ("MLX_ENABLE_CACHE_THRASHING_CHECK", "0"),
    ("MLX_CUDA_GRAPH_CACHE_SIZE", "2000"),
    ("MLX_CUDA_USE_CUDNN_SDPA", "0"),
    ("MLX_MAX_OPS_PER_BUFFER", "10"),
];

/// Prepares the process for MLX: sets those variables that the environment does not set, bounds what the
/// allocator keeps, and has memory that ran out reported. Call it before any thread is started.
pub fn prepare() {
    memory::report_faults();
    memory::bound_heaps();
    // Metal reads some of them too, and needs other values.
    let settings = if cfg!(target_os = "macos") { &[] } else { &SETTINGS[..] };
    for (name, value) in settings.iter().filter(|(name, _)| std::env::var_os(name).is_none()) {
        // SAFETY: the caller has no other thread yet, which could read the environment meanwhile.
        unsafe { std::env::set_var(name, value) };
    }
}

/// Returns the version of MLX, such as "0.32.2".
pub(crate) fn mlx_version() -> String {
    // SAFETY: the string handle is made and freed here, and its data is copied in between.
    unsafe {
        let mut text = mlx_sys::mlx_string_new();
        mlx_sys::mlx_version(&raw mut text);
        let data = mlx_sys::mlx_string_data(text);
        let version =
            if data.is_null() { String::new() } else { CStr::from_ptr(data).to_string_lossy().into_owned() };
        mlx_sys::mlx_string_free(text);
        version
    }
}

/// An empty array handle, to be filled by a call.
struct Handle(mlx_array);

impl Handle {
    fn new() -> Self {
        // SAFETY: makes an empty handle, which `take` or `drop` frees.
        Self(unsafe { mlx_sys::mlx_array_new() })
    }

    /// Returns the array that a call with this status has filled in.
    fn take(mut self, status: c_int, operation: &str) -> Result<Array> {
        if status != 0 {
            return Err(Exception::custom(format!("{operation} was refused")));
        }
        // SAFETY: an empty handle needs no free, so it may stand in for the one that is given away.
        let empty = unsafe { mlx_sys::mlx_array_new() };
        // SAFETY: the call has filled the handle, and nobody else has it.
        Ok(unsafe { Array::from_ptr(std::mem::replace(&mut self.0, empty)) })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle is this struct's own, and is freed once.
        unsafe {
            mlx_sys::mlx_array_free(self.0);
        }
    }
}

/// Returns the first `count` arrays that a call with this status has put into a vector.
///
/// # Safety
/// `made` must be a live handle.
unsafe fn take_all(
    status: c_int,
    made: mlx_sys::mlx_vector_array,
    count: usize,
    operation: &str,
) -> Result<Vec<Array>> {
    let take = |index| {
        let mut array = Handle::new();
        // SAFETY: `made` is live by contract, and the call sets `array` if it succeeds.
        let mut get = || unsafe { mlx_sys::mlx_vector_array_get(&raw mut array.0, made, index) };
        let status = if status == 0 { get() } else { status };
        array.take(status, operation)
    };
    (0..count).map(take).collect()
}

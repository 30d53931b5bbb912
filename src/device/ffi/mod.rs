//! The one file that calls C itself: what mlx-rs 0.33 does not wrap of mlx-c, and operations of our own.
#![allow(unsafe_code, reason = "mlx-c is a C interface; mlx-rs has no wrapper for these")]

use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr;

use mlx_rs::Array;
use mlx_rs::error::{Exception, Result};
use mlx_sys::{mlx_array, mlx_vector_array};

/// A fact of a device that MLX reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum DeviceFact {
    /// A size in bytes or a count.
    Size(u64),
    /// A name.
    Text(String),
}

/// Looks a fact up for the default device, such as "device_name" or "memory_size"; None where MLX does
/// not know it.
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

/// What MLX reads from the environment, for CUDA. Its caches there end a program that has many shapes of steps; cuDNN
/// plans attention anew for every length of a prompt, for 20 ms and more; and short graphs let the GPU begin while
/// the host is still at the rest of the step (an 8B at 4 bits on an H200: 200 tokens/s, with MLX's default 170).
const SETTINGS: [(&str, &str); 4] = [
    ("MLX_ENABLE_CACHE_THRASHING_CHECK", "0"),
    ("MLX_CUDA_GRAPH_CACHE_SIZE", "2000"),
    ("MLX_CUDA_USE_CUDNN_SDPA", "0"),
    ("MLX_MAX_OPS_PER_BUFFER", "10"),
];

/// Sets up MLX for a process whose environment does not say otherwise. To be called before any thread is started.
pub fn prepare() {
    // Metal reads some of them too, and has other needs.
    let settings = if cfg!(target_os = "macos") { &[] } else { &SETTINGS[..] };
    for (name, value) in settings.iter().filter(|(name, _)| std::env::var_os(name).is_none()) {
        // SAFETY: the caller has no other thread yet, which could read the environment meanwhile.
        unsafe { std::env::set_var(name, value) };
    }
}

/// Gives freed memory back to the system, where the allocator does not by itself.
pub(crate) fn trim_heap() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// The version of MLX, such as "0.32.2".
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

type Swiglu = unsafe extern "C" fn(*mut mlx_array, mlx_array) -> c_int;
type RmsNorm =
    unsafe extern "C" fn(*mut mlx_array, *mut mlx_array, mlx_array, mlx_array, mlx_array, f32) -> c_int;
type Attend = unsafe extern "C" fn(
    *mut mlx_vector_array,
    mlx_array,
    mlx_array,
    mlx_array,
    mlx_vector_array,
    *const AttentionShape,
    *const AttentionSpan,
    usize,
) -> c_int;

/// The CPU operations of `native/mlx_ops.cpp`. They are there where the set-up put them into the mlx-c
/// library, on Linux, and are looked up by name: elsewhere MLX's own operations do the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Kernels {
    swiglu: Swiglu,
    rms_norm: RmsNorm,
    attend: Attend,
}

/// Head sizes that attention takes, as in `native/cpu_ops.h`.
pub(crate) const HEAD_DIM_MAX: i32 = 256;
/// See [`HEAD_DIM_MAX`].
pub(crate) const HEAD_DIM_MULTIPLE: i32 = 16;

/// `struct mlxd_attention_shape` of `native/cpu_ops.h`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape {
    pub(crate) heads: c_int,
    pub(crate) kv_heads: c_int,
    pub(crate) head_dim: c_int,
    /// Numbers of a head that are turned.
    pub(crate) rotated: c_int,
    /// Whether neighbours are turned together, not halves.
    pub(crate) traditional: c_int,
    /// Positions that a token sees at most; 0 is all.
    pub(crate) window: c_int,
    pub(crate) scale: f32,
}

/// `struct mlxd_span` of `native/cpu_ops.h`: one sequence's consecutive tokens.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttentionSpan {
    /// Which of the slabs given, and the place in it.
    pub(crate) slab: c_int,
    pub(crate) slot: c_int,
    /// First of its rows among the packed tokens, and how many.
    pub(crate) row: c_int,
    pub(crate) rows: c_int,
    /// Position of the first one.
    pub(crate) start: c_int,
}

/// Looks a C function up by name in what the process has loaded.
fn symbol(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: the name ends with a zero byte, and RTLD_DEFAULT is a valid handle.
    let address = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!address.is_null()).then_some(address)
}

impl Kernels {
    /// All of them, or None where they are not.
    pub(crate) fn find() -> Option<Self> {
        let (swiglu, rms_norm, attend) =
            (symbol(c"mlxd_swiglu")?, symbol(c"mlxd_rms_norm")?, symbol(c"mlxd_attend")?);
        // SAFETY: these are the functions of native/mlx_ops.cpp, whose C types the fields repeat.
        unsafe {
            Some(Self {
                swiglu: std::mem::transmute::<*mut c_void, Swiglu>(swiglu),
                rms_norm: std::mem::transmute::<*mut c_void, RmsNorm>(rms_norm),
                attend: std::mem::transmute::<*mut c_void, Attend>(attend),
            })
        }
    }

    /// `silu(gate) * up`, both side by side in `gate_up`.
    pub(crate) fn swiglu(self, gate_up: &Array) -> Result<Array> {
        let mut out = Handle::new();
        // SAFETY: both handles live through the call, which sets `out` if it succeeds.
        let status = unsafe { (self.swiglu)(&raw mut out.0, gate_up.as_ptr()) };
        out.take(status, "swiglu")
    }

    /// The root mean square norm of `x`.
    pub(crate) fn rms_norm(self, x: &Array, weight: &Array, eps: f32) -> Result<Array> {
        let (mut out, mut unused, none) = (Handle::new(), Handle::new(), Handle::new());
        // SAFETY: all handles live through the call, which sets `out` if it succeeds.
        let status = unsafe {
            (self.rms_norm)(&raw mut out.0, &raw mut unused.0, x.as_ptr(), none.0, weight.as_ptr(), eps)
        };
        out.take(status, "rms_norm")
    }

    /// `x + y`, and the norm of that.
    pub(crate) fn add_rms_norm(
        self,
        x: &Array,
        y: &Array,
        weight: &Array,
        eps: f32,
    ) -> Result<(Array, Array)> {
        let (mut out, mut sum) = (Handle::new(), Handle::new());
        // SAFETY: all handles live through the call, which sets `out` and `sum` if it succeeds.
        let status = unsafe {
            (self.rms_norm)(&raw mut out.0, &raw mut sum.0, x.as_ptr(), y.as_ptr(), weight.as_ptr(), eps)
        };
        Ok((sum.take(status, "rms_norm")?, out.take(status, "rms_norm")?))
    }

    /// Writes the keys and values of packed tokens to their slots and attends; the output, and the slabs that
    /// replace those given.
    pub(crate) fn attend(
        self,
        (qkv, cos, sin): (&Array, &Array, &Array),
        slabs: &[Array],
        shape: &AttentionShape,
        spans: &[AttentionSpan],
    ) -> Result<(Array, Vec<Array>)> {
        let handles: Vec<mlx_array> = slabs.iter().map(Array::as_ptr).collect();
        // SAFETY: the handles live through the calls; the vectors copy what they are given, are used on this
        // thread only, and are freed once.
        unsafe {
            let given = mlx_sys::mlx_vector_array_new_data(handles.as_ptr(), handles.len());
            let mut made = mlx_sys::mlx_vector_array_new();
            let (first, count) = (spans.as_ptr(), spans.len());
            let status = (self.attend)(
                &raw mut made,
                qkv.as_ptr(),
                cos.as_ptr(),
                sin.as_ptr(),
                given,
                &raw const *shape,
                first,
                count,
            );
            let taken = (0..=slabs.len()).map(|index| {
                let mut array = Handle::new();
                let status = if status == 0 {
                    mlx_sys::mlx_vector_array_get(&raw mut array.0, made, index)
                } else {
                    status
                };
                array.take(status, "attend")
            });
            let taken: Result<Vec<Array>> = taken.collect();
            mlx_sys::mlx_vector_array_free(given);
            mlx_sys::mlx_vector_array_free(made);
            let mut taken = taken?.into_iter();
            let out = taken.next().ok_or_else(|| Exception::custom("attend gave nothing"))?;
            Ok((out, taken.collect()))
        }
    }
}

/// An empty array handle, to be filled by a call.
struct Handle(mlx_array);

impl Handle {
    fn new() -> Self {
        // SAFETY: makes an empty handle, which `take` or `drop` frees.
        Self(unsafe { mlx_sys::mlx_array_new() })
    }

    /// The array that a call with this status has put in.
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

/// Whether MLX computes on an NVIDIA GPU.
pub(crate) fn on_cuda() -> bool {
    let mut available = false;
    // SAFETY: the out-pointer is to a local.
    unsafe {
        mlx_sys::mlx_cuda_is_available(&raw mut available);
    }
    available
}

/// A CUDA kernel of our own, compiled by MLX at its first run.
pub(crate) struct CudaKernel {
    handle: mlx_sys::mlx_fast_cuda_kernel,
}

/// How one run of a kernel is laid out.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CudaLaunch {
    /// Blocks.
    pub(crate) grid: [c_int; 3],
    /// Threads of a block.
    pub(crate) threads: c_int,
}

impl CudaKernel {
    /// A kernel of this body, with `header` before it. Inputs and outputs are pointers of these names.
    pub(crate) fn new(
        name: &str,
        inputs: &[&CStr],
        outputs: &[&CStr],
        body: &str,
        header: &str,
    ) -> Result<Self> {
        let text = |text: &str| CString::new(text).map_err(|why| Exception::custom(why.to_string()));
        let (name, body, header) = (text(name)?, text(body)?, text(header)?);
        let names = |names: &[&CStr]| {
            let mut pointers: Vec<_> = names.iter().map(|name| name.as_ptr()).collect();
            // SAFETY: the texts outlive the call, which copies them.
            unsafe { mlx_sys::mlx_vector_string_new_data(pointers.as_mut_ptr(), pointers.len()) }
        };
        let (inputs, outputs) = (names(inputs), names(outputs));
        // SAFETY: all texts and vectors outlive the call, which copies them; the vectors are freed once.
        let handle = unsafe {
            let handle = mlx_sys::mlx_fast_cuda_kernel_new(
                name.as_ptr(),
                inputs,
                outputs,
                body.as_ptr(),
                header.as_ptr(),
                true,
                0,
            );
            mlx_sys::mlx_vector_string_free(inputs);
            mlx_sys::mlx_vector_string_free(outputs);
            handle
        };
        if handle.ctx.is_null() {
            Err(Exception::custom("MLX refused a CUDA kernel"))
        } else {
            Ok(Self { handle })
        }
    }

    /// Runs it on row-contiguous inputs; outputs of these shapes and dtypes.
    pub(crate) fn run(
        &self,
        inputs: &[&Array],
        outputs: &[(&[c_int], mlx_rs::Dtype)],
        launch: CudaLaunch,
    ) -> Result<Vec<Array>> {
        let handles: Vec<mlx_array> = inputs.iter().map(|array| array.as_ptr()).collect();
        let CudaLaunch { grid: [x, y, z], threads } = launch;
        // SAFETY: every handle is made here, used on this thread only and freed once; the vector copies its
        // arrays, and the shapes outlive the calls that read them.
        unsafe {
            let config = mlx_sys::mlx_fast_cuda_kernel_config_new();
            // MLX counts a grid in threads.
            mlx_sys::mlx_fast_cuda_kernel_config_set_grid(config, x * threads, y, z);
            mlx_sys::mlx_fast_cuda_kernel_config_set_thread_group(config, threads, 1, 1);
            for (shape, dtype) in outputs {
                let (first, dtype) = (shape.as_ptr(), *dtype as mlx_sys::mlx_dtype);
                mlx_sys::mlx_fast_cuda_kernel_config_add_output_arg(config, first, shape.len(), dtype);
            }
            let given = mlx_sys::mlx_vector_array_new_data(handles.as_ptr(), handles.len());
            let mut made = mlx_sys::mlx_vector_array_new();
            let stream = mlx_sys::mlx_default_gpu_stream_new();
            let status =
                mlx_sys::mlx_fast_cuda_kernel_apply(&raw mut made, self.handle, given, config, stream);
            let taken = (0..outputs.len()).map(|index| {
                let mut array = Handle::new();
                let status = if status == 0 {
                    mlx_sys::mlx_vector_array_get(&raw mut array.0, made, index)
                } else {
                    status
                };
                array.take(status, "a CUDA kernel")
            });
            let taken: Result<Vec<Array>> = taken.collect();
            mlx_sys::mlx_stream_free(stream);
            mlx_sys::mlx_vector_array_free(given);
            mlx_sys::mlx_vector_array_free(made);
            mlx_sys::mlx_fast_cuda_kernel_config_free(config);
            taken
        }
    }
}

impl Drop for CudaKernel {
    fn drop(&mut self) {
        // SAFETY: the handle is this struct's own, and is freed once.
        unsafe { mlx_sys::mlx_fast_cuda_kernel_free(self.handle) }
    }
}

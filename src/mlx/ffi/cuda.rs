//! CUDA kernels of our own, which MLX compiles and runs.

use std::ffi::{CStr, CString, c_int};
use std::sync::LazyLock;

use mlx_rs::Array;
use mlx_rs::error::{Exception, Result};
use mlx_sys::mlx_array;

use super::take_all;

/// Whether MLX computes on an NVIDIA GPU; a fact of the machine.
pub(crate) fn on_cuda() -> bool {
    static ON_CUDA: LazyLock<bool> = LazyLock::new(|| {
        let mut available = false;
        // SAFETY: the out-pointer is to a local.
        unsafe {
            mlx_sys::mlx_cuda_is_available(&raw mut available);
        }
        available
    });
    *ON_CUDA
}

/// A CUDA kernel of our own, compiled by MLX at its first run.
pub(crate) struct CudaKernel {
    handle: mlx_sys::mlx_fast_cuda_kernel,
}

/// The layout of one run of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CudaLaunch {
    /// Number of blocks along each axis.
    pub(crate) grid: [c_int; 3],
    /// Number of threads of a block.
    pub(crate) threads: c_int,
}

impl CudaKernel {
    /// Makes a kernel of this body, with `header` before it. Inputs and outputs are pointers of these names.
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

    /// Runs it on row-contiguous inputs; returns outputs of these shapes and dtypes.
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
            let taken = take_all(status, made, outputs.len(), "a CUDA kernel");
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

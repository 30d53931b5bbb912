//! Products with quantized matrices in every format that MLX has; mlx-rs's functions know the affine one.

use std::ffi::CStr;

use mlx_rs::error::Result;
use mlx_rs::{Array, Stream};
use mlx_sys::mlx_array;

use super::Handle;

/// The format of packed elements, as MLX names it (mlx/ops.h, `quantize`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QuantMode {
    /// `scale * q + bias`, both floats.
    Affine,
    /// E2M1 elements with E8M0 scales.
    Mxfp4,
    /// E4M3 elements with E8M0 scales.
    Mxfp8,
    /// E2M1 elements with E4M3 scales.
    Nvfp4,
}

/// A quantized matrix `[.., out, in]` as MLX's operations take it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Packed<'a> {
    pub(crate) numbers: &'a Array,
    pub(crate) scales: &'a Array,
    /// Biases of the affine mode.
    pub(crate) biases: Option<&'a Array>,
    pub(crate) group_size: i32,
    pub(crate) bits: i32,
    pub(crate) mode: QuantMode,
}

impl Packed<'_> {
    /// Returns the C arguments that all operations share: biases, group size, bits, mode.
    fn arguments(
        &self,
        none: &Handle,
    ) -> (mlx_array, mlx_sys::mlx_optional_int, mlx_sys::mlx_optional_int, &'static CStr) {
        let number = |value| mlx_sys::mlx_optional_int { value, has_value: true };
        let mode = match self.mode {
            QuantMode::Affine => c"affine",
            QuantMode::Mxfp4 => c"mxfp4",
            QuantMode::Mxfp8 => c"mxfp8",
            QuantMode::Nvfp4 => c"nvfp4",
        };
        let biases = self.biases.map_or(none.0, Array::as_ptr);
        (biases, number(self.group_size), number(self.bits), mode)
    }

    /// Returns the matrix as floats.
    pub(crate) fn dequantize(&self, dtype: mlx_rs::Dtype) -> Result<Array> {
        let (mut out, none) = (Handle::new(), Handle::new());
        let (biases, group, bits, mode) = self.arguments(&none);
        let dtype = mlx_sys::mlx_optional_dtype { value: dtype as mlx_sys::mlx_dtype, has_value: true };
        // SAFETY: all handles live through the call, which sets `out` if it succeeds.
        let status = unsafe {
            let stream = Stream::thread_local_or_default();
            let (numbers, scales) = (self.numbers.as_ptr(), self.scales.as_ptr());
            let (mode, stream) = (mode.as_ptr(), stream.as_ref().as_ptr());
            mlx_sys::mlx_dequantize(
                &raw mut out.0,
                numbers,
                scales,
                biases,
                group,
                bits,
                mode,
                none.0,
                dtype,
                stream,
            )
        };
        out.take(status, "dequantize")
    }

    /// Returns `x @ w^T`.
    pub(crate) fn product(&self, x: &Array) -> Result<Array> {
        let (mut out, none) = (Handle::new(), Handle::new());
        let (biases, group, bits, mode) = self.arguments(&none);
        // SAFETY: all handles live through the call, which sets `out` if it succeeds.
        let status = unsafe {
            let stream = Stream::thread_local_or_default();
            let (numbers, scales, stream) =
                (self.numbers.as_ptr(), self.scales.as_ptr(), stream.as_ref().as_ptr());
            mlx_sys::mlx_quantized_matmul(
                &raw mut out.0,
                x.as_ptr(),
                numbers,
                scales,
                biases,
                true,
                group,
                bits,
                mode.as_ptr(),
                stream,
            )
        };
        out.take(status, "a quantized product")
    }

    /// Returns `x[i] @ w[experts[i]]^T`.
    pub(crate) fn gather_product(&self, x: &Array, experts: &Array, sorted: bool) -> Result<Array> {
        let (mut out, none) = (Handle::new(), Handle::new());
        let (biases, group, bits, mode) = self.arguments(&none);
        // SAFETY: all handles live through the call, which sets `out` if it succeeds.
        let status = unsafe {
            let stream = Stream::thread_local_or_default();
            let (numbers, scales, stream) =
                (self.numbers.as_ptr(), self.scales.as_ptr(), stream.as_ref().as_ptr());
            let (x, experts, mode) = (x.as_ptr(), experts.as_ptr(), mode.as_ptr());
            mlx_sys::mlx_gather_qmm(
                &raw mut out.0,
                x,
                numbers,
                scales,
                biases,
                none.0,
                experts,
                true,
                group,
                bits,
                mode,
                sorted,
                stream,
            )
        };
        out.take(status, "a gathered quantized product")
    }
}

//! Quantization, and products with quantized matrices, in every format that MLX has; mlx-rs's functions know
//! the affine one.

use std::ffi::CStr;

use mlx_rs::error::Result;
use mlx_rs::{Array, Stream};
use mlx_sys::mlx_array;

use super::{Handle, take_all};
use crate::quantize::{QuantFormat, QuantMode};

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

/// Returns MLX's name of a mode.
fn word(mode: QuantMode) -> &'static CStr {
    match mode {
        QuantMode::Affine => c"affine",
        QuantMode::Mxfp4 => c"mxfp4",
        QuantMode::Mxfp8 => c"mxfp8",
        QuantMode::Nvfp4 => c"nvfp4",
    }
}

/// Returns bits or columns as MLX counts them; a `QuantFormat` has few of either.
fn count_of(number: u32) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// Quantizes floats `[.., out, in]`: packed elements and scales, and biases in the affine mode.
pub(crate) fn quantize(matrix: &Array, format: QuantFormat) -> Result<Vec<Array>> {
    let QuantFormat { mode, bits, group_size } = format;
    let number = |value: u32| mlx_sys::mlx_optional_int { value: count_of(value), has_value: true };
    let none = Handle::new();
    let count = if mode == QuantMode::Affine { 3 } else { 2 };
    // SAFETY: all handles live through the call; the vector is made, filled and freed here.
    unsafe {
        let stream = Stream::thread_local_or_default();
        let mut made = mlx_sys::mlx_vector_array_new();
        let (group, bits, stream) = (number(group_size), number(bits), stream.as_ref().as_ptr());
        let mode = word(mode).as_ptr();
        let status = mlx_sys::mlx_quantize(&raw mut made, matrix.as_ptr(), group, bits, mode, none.0, stream);
        let arrays = take_all(status, made, count, "quantize");
        mlx_sys::mlx_vector_array_free(made);
        arrays
    }
}

impl Packed<'_> {
    /// Returns the C arguments that all operations share: biases, group size, bits, mode.
    fn arguments(
        &self,
        none: &Handle,
    ) -> (mlx_array, mlx_sys::mlx_optional_int, mlx_sys::mlx_optional_int, &'static CStr) {
        let number = |value| mlx_sys::mlx_optional_int { value, has_value: true };
        let biases = self.biases.map_or(none.0, Array::as_ptr);
        (biases, number(self.group_size), number(self.bits), word(self.mode))
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

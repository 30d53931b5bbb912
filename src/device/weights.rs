//! A model's tensors while it loads: a cursor that hands each out once, checked against the shape that
//! the architecture expects. What is missing fails the load by name, and so does what is left over.
//!
//! Files are read lazily, tensor by tensor, when a taken array is evaluated; their headers have been
//! checked before (`hub::inspect`), because MLX trusts them.

use std::collections::HashMap;
use std::path::Path;

use mlx_rs::{Array, Dtype};

use crate::device::layers::{Fused, GatedMlp, Linear, Matrix, Ops, Quantized, RmsNorm};
use crate::error::Error;
use crate::ids::ModelName;

/// What becomes of stored numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    /// Floats, scales included, are cast to this.
    pub(crate) float: Dtype,
    /// Quantized matrices become plain floats.
    pub(crate) dequantize: bool,
    /// How layers compute.
    pub(crate) ops: Ops,
}

/// Tensors that have not been taken yet.
#[derive(Debug)]
pub(crate) struct Weights {
    model: ModelName,
    policy: Policy,
    tensors: HashMap<String, Array>,
    parameters: u64,
}

impl Weights {
    /// Opens the files of a model.
    pub(crate) fn open<'a>(
        model: &ModelName,
        files: impl Iterator<Item = &'a Path>,
        policy: Policy,
    ) -> Result<Self, Error> {
        let mut tensors = HashMap::new();
        for file in files {
            tensors.extend(Array::load_safetensors(file)?);
        }
        Ok(Self { model: model.clone(), policy, tensors, parameters: 0 })
    }

    /// Numbers taken so far; packed ones count one by one.
    pub(crate) fn parameters(&self) -> u64 {
        self.parameters
    }

    /// An error that blames the model's files.
    pub(crate) fn invalid(&self, why: impl Into<String>) -> Error {
        Error::ModelInvalid { model: self.model.clone(), why: why.into() }
    }

    /// Drops tensors that the architecture does not use.
    pub(crate) fn discard(&mut self, unused: impl Fn(&str) -> bool) {
        self.tensors.retain(|name, _| !unused(name));
    }

    /// Whether a tensor is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Takes a float tensor of a known shape.
    pub(crate) fn floats(&mut self, name: &str, shape: &[i32]) -> Result<Array, Error> {
        let array = self.remove(name)?;
        if array.shape() != shape {
            return Err(self.invalid(format!("{name} has shape {:?}, not {shape:?}", array.shape())));
        }
        self.parameters += array.size() as u64;
        self.cast(name, &array)
    }

    /// Takes a norm's weight.
    pub(crate) fn rms_norm(&mut self, prefix: &str, size: i32, eps: f32) -> Result<RmsNorm, Error> {
        let weight = self.floats(&format!("{prefix}.weight"), &[size])?;
        Ok(RmsNorm { weight, eps, ops: self.policy.ops })
    }

    /// Takes the matrix `[out, columns]` at `prefix`, quantized if it has scales there. Bits and group
    /// size follow from the shapes, as in mlx-lm (utils.py, infer_quant_config).
    pub(crate) fn matrix(&mut self, prefix: &str, out: i32, columns: i32) -> Result<Matrix, Error> {
        let name = format!("{prefix}.weight");
        if !self.has(&format!("{prefix}.scales")) {
            return Ok(Matrix::Dense(self.floats(&name, &[out, columns])?));
        }
        let packed = self.remove(&name)?;
        let scales = self.remove(&format!("{prefix}.scales"))?;
        if packed.dtype() != Dtype::Uint32 || scales.dtype() == Dtype::Uint8 {
            return Err(Error::ModelUnsupported {
                model: self.model.clone(),
                why: format!("{prefix} is quantized, but not in the affine format"),
            });
        }
        let (&[rows, words], &[_, groups]) = (packed.shape(), scales.shape()) else {
            return Err(self.invalid(format!("{prefix}: quantized tensors must have two dimensions")));
        };
        let (bits, group_size) = (words * 32 / columns, columns / groups.max(1));
        let known = [2, 3, 4, 5, 6, 8].contains(&bits) && [32, 64, 128].contains(&group_size);
        if !known || rows != out || bits * columns != words * 32 || group_size * groups != columns {
            let shapes = format!("{:?} with scales {:?}", packed.shape(), scales.shape());
            return Err(self.invalid(format!("{prefix}: {shapes} is no quantization of [{out}, {columns}]")));
        }
        let biases = self.remove(&format!("{prefix}.biases"))?;
        if scales.shape() != [out, groups] || biases.shape() != scales.shape() {
            return Err(
                self.invalid(format!("{prefix}: scales and biases must have shape [{out}, {groups}]"))
            );
        }
        self.parameters += u64::from(out.unsigned_abs()) * u64::from(columns.unsigned_abs());
        let quantized = Quantized {
            scales: self.cast(prefix, &scales)?,
            biases: self.cast(prefix, &biases)?,
            packed,
            group_size,
            bits,
        };
        if self.policy.dequantize {
            return Ok(Matrix::Dense(quantized.dequantize()?));
        }
        Ok(Matrix::Quantized(quantized))
    }

    /// Takes a linear layer, with a bias if the architecture has one there.
    pub(crate) fn linear(
        &mut self,
        prefix: &str,
        out: i32,
        columns: i32,
        bias: bool,
    ) -> Result<Linear, Error> {
        let weight = self.matrix(prefix, out, columns)?;
        let bias = if bias { Some(self.floats(&format!("{prefix}.bias"), &[out])?) } else { None };
        Ok(Linear::new(weight, bias))
    }

    /// Takes layers that read the same input, `(name, out)` each, and fuses them.
    pub(crate) fn fused(
        &mut self,
        prefix: &str,
        parts: &[(&str, i32)],
        columns: i32,
        bias: bool,
    ) -> Result<Fused, Error> {
        let parts =
            parts.iter().map(|(name, out)| self.linear(&format!("{prefix}.{name}"), *out, columns, bias));
        Ok(Fused::new(parts.collect::<Result<_, _>>()?)?)
    }

    /// Takes a gated MLP: gate_proj, up_proj and down_proj.
    pub(crate) fn gated_mlp(
        &mut self,
        prefix: &str,
        hidden: i32,
        inner: i32,
        bias: bool,
    ) -> Result<GatedMlp, Error> {
        Ok(GatedMlp {
            gate_up: self.fused(prefix, &[("gate_proj", inner), ("up_proj", inner)], hidden, bias)?,
            down: self.linear(&format!("{prefix}.down_proj"), hidden, inner, bias)?,
            ops: self.policy.ops,
        })
    }

    /// Ends the load: nothing may be left.
    pub(crate) fn finish(&self) -> Result<(), Error> {
        let mut left: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        if left.is_empty() {
            return Ok(());
        }
        left.sort_unstable();
        let more = if left.len() > 8 { format!(" and {} more", left.len() - 8) } else { String::new() };
        left.truncate(8);
        Err(self.invalid(format!("unknown tensors: {}{more}", left.join(", "))))
    }

    fn remove(&mut self, name: &str) -> Result<Array, Error> {
        self.tensors.remove(name).ok_or_else(|| self.invalid(format!("the tensor {name} is missing")))
    }

    fn cast(&self, name: &str, array: &Array) -> Result<Array, Error> {
        match array.dtype() {
            dtype if dtype == self.policy.float => Ok(array.clone()),
            Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16 => Ok(array.as_dtype(self.policy.float)?),
            other => Err(self.invalid(format!("{name} has dtype {other:?}, not a float"))),
        }
    }
}

/// Bytes of arrays, for accounting.
pub(crate) fn bytes_of<'a>(arrays: impl IntoIterator<Item = &'a Array>) -> u64 {
    arrays.into_iter().map(|array| array.nbytes() as u64).sum()
}

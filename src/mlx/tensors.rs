//! A model's tensors while it loads: a cursor that hands each out once, checked against the shape that
//! the architecture expects. What is missing fails the load by name, and so does what is left over.
//!
//! Files are read lazily, tensor by tensor, when a taken array is evaluated; their headers have been
//! checked before (`hub::inspect`), because MLX trusts them.

use std::collections::HashMap;
use std::path::Path;

use mlx_rs::{Array, Dtype};

use crate::error::Error;
use crate::ids::ModelName;
use crate::mlx::ffi::{Gate, QuantMode};
use crate::mlx::kernels::KernelSet;
use crate::mlx::layers::{Activation, ExpertMatrix, Experts, Fused, Linear, Matrix, Mlp, Quantized, RmsNorm};

/// What becomes of stored numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    /// Floats, scales included, are cast to this.
    pub(crate) float: Dtype,
    /// Quantized matrices become plain floats.
    pub(crate) dequantize: bool,
    /// How layers compute.
    pub(crate) ops: KernelSet,
}

/// Tensors that have not been taken yet.
#[derive(Debug)]
pub(crate) struct TensorCursor {
    model: ModelName,
    policy: Policy,
    tensors: HashMap<String, Array>,
    parameters: u64,
}

impl TensorCursor {
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

    /// Drops layers from `first` on, whose names begin with a prefix and their number.
    pub(crate) fn discard_layers(&mut self, prefix: &str, first: usize) {
        self.discard(|name| {
            let number = name.strip_prefix(prefix).and_then(|rest| rest.split('.').next());
            number.and_then(|number| number.parse::<usize>().ok()).is_some_and(|layer| layer >= first)
        });
    }

    /// Calls tensors otherwise; None keeps a name.
    pub(crate) fn rename(&mut self, new_name: impl Fn(&str) -> Option<String>) {
        let tensors = std::mem::take(&mut self.tensors);
        let renamed = tensors.into_iter().map(|(name, array)| (new_name(&name).unwrap_or(name), array));
        self.tensors = renamed.collect();
    }

    /// Of a model with several parts, drops those that see and hear, and calls tensors of the text part as if it
    /// stood alone.
    pub(crate) fn take_text_part(&mut self) {
        const OTHERS: [&str; 9] = [
            "vision_tower.",
            "vision_model.",
            "vision_embedder.",
            "visual.",
            "audio_tower.",
            "multi_modal_projector.",
            "embed_audio.",
            "embed_vision.",
            "image_newline",
        ];
        const TEXT: [&str; 2] = ["model.language_model.", "language_model."];
        if !self.tensors.keys().any(|name| TEXT.iter().any(|text| name.starts_with(text))) {
            return;
        }
        self.discard(|name| {
            let name = name.strip_prefix("model.").unwrap_or(name);
            OTHERS.iter().any(|other| name.starts_with(other))
        });
        self.rename(|name| {
            let inner = name.strip_prefix(TEXT[0]).map(|rest| format!("model.{rest}"));
            inner.or_else(|| name.strip_prefix(TEXT[1]).map(str::to_owned))
        });
    }

    /// Whether some tensor meets a condition.
    pub(crate) fn any(&self, condition: impl Fn(&str, &Array) -> bool) -> bool {
        self.tensors.iter().any(|(name, array)| condition(name, array))
    }

    /// Changes the tensors whose names are wanted.
    pub(crate) fn change(
        &mut self,
        wanted: impl Fn(&str) -> bool,
        change: impl Fn(&Array) -> mlx_rs::error::Result<Array>,
    ) -> Result<(), Error> {
        for (_, array) in self.tensors.iter_mut().filter(|(name, _)| wanted(name)) {
            *array = change(array)?;
        }
        Ok(())
    }

    /// Puts the matrices of single experts, `{prefix}.{expert}.{part}.*`, into stacks `{stack}.*`.
    pub(crate) fn stack_experts(
        &mut self,
        prefix: &str,
        part: &str,
        stack: &str,
        experts: i32,
    ) -> Result<(), Error> {
        for kind in ["weight", "scales", "biases", "bias"] {
            if !self.has(&format!("{prefix}.0.{part}.{kind}")) {
                continue;
            }
            let all = (0..experts).map(|expert| self.remove(&format!("{prefix}.{expert}.{part}.{kind}")));
            let all = all.collect::<Result<Vec<_>, _>>()?;
            self.tensors.insert(format!("{stack}.{kind}"), mlx_rs::ops::stack(&all, 0)?);
        }
        Ok(())
    }

    /// Stacks the experts of all layers where Hugging Face's files have them one by one.
    pub(crate) fn stack_gated_experts(&mut self, layers: usize, experts: i32) -> Result<(), Error> {
        for layer in 0..layers {
            let mlp = format!("model.layers.{layer}.mlp");
            for part in ["gate_proj", "up_proj", "down_proj"] {
                let stack = format!("{mlp}.switch_mlp.{part}");
                self.stack_experts(&format!("{mlp}.experts"), part, &stack, experts)?;
            }
        }
        Ok(())
    }

    /// Puts the parts of a tensor, cut in equal pieces along an axis, under names of their own.
    pub(crate) fn split(&mut self, name: &str, axis: i32, parts: &[String]) -> Result<(), Error> {
        let Some(array) = self.tensors.remove(name) else { return Ok(()) };
        let pieces = i32::try_from(parts.len()).unwrap_or(i32::MAX);
        let place = if axis < 0 { axis + crate::mlx::dim(array.ndim()) } else { axis };
        let size = usize::try_from(place).ok().and_then(|place| array.shape().get(place));
        if size.is_none_or(|size| size % pieces != 0) {
            return Err(self.invalid(format!("{name} of shape {:?} has no {pieces} parts", array.shape())));
        }
        for (part, array) in parts.iter().zip(array.split_equal(pieces, axis)?) {
            self.tensors.insert(part.clone(), array);
        }
        Ok(())
    }

    /// Whether a tensor is there.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// How layers compute.
    pub(crate) fn ops(&self) -> KernelSet {
        self.policy.ops
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

    /// Takes a tensor of a known shape that computes in single precision whatever the model does.
    pub(crate) fn single(&mut self, name: &str, shape: &[i32]) -> Result<Array, Error> {
        let array = self.remove(name)?;
        if array.shape() != shape {
            return Err(self.invalid(format!("{name} has shape {:?}, not {shape:?}", array.shape())));
        }
        self.parameters += array.size() as u64;
        Ok(array.as_dtype(Dtype::Float32)?)
    }

    /// Takes a norm's weight.
    pub(crate) fn rms_norm(&mut self, prefix: &str, size: i32, eps: f32) -> Result<RmsNorm, Error> {
        self.rms_norm_at(&format!("{prefix}.weight"), size, eps)
    }

    /// Takes a norm's weight by its whole name.
    pub(crate) fn rms_norm_at(&mut self, name: &str, size: i32, eps: f32) -> Result<RmsNorm, Error> {
        let weight = self.floats(name, &[size])?;
        Ok(RmsNorm { weight, eps, ops: self.policy.ops })
    }

    /// Takes the matrix `[out, columns]` at `prefix`, quantized if it has scales there.
    pub(crate) fn matrix(&mut self, prefix: &str, out: i32, columns: i32) -> Result<Matrix, Error> {
        self.matrices(prefix, &[out, columns])
    }

    /// Takes a matrix, or a stack of them, of this shape `[.., out, columns]`. Bits, group size and mode follow from the shapes, as in
    /// mlx-lm (utils.py, infer_quant_config).
    pub(crate) fn matrices(&mut self, prefix: &str, shape: &[i32]) -> Result<Matrix, Error> {
        let name = format!("{prefix}.weight");
        if !self.has(&format!("{prefix}.scales")) {
            return Ok(Matrix::Dense(self.floats(&name, shape)?));
        }
        let packed = self.remove(&name)?;
        let scales = self.remove(&format!("{prefix}.scales"))?;
        let (&[.., columns], [rest @ .., words], [of_scales @ .., groups]) =
            (shape, packed.shape(), scales.shape())
        else {
            return Err(self.invalid(format!("{prefix}: a quantized tensor without a dimension")));
        };
        let (bits, group_size) = (words * 32 / columns, columns / groups.max(&1));
        let mode = match (scales.dtype(), bits, group_size) {
            (Dtype::Uint8, 4, 32) => Some(QuantMode::Mxfp4),
            (Dtype::Uint8, 8, 32) => Some(QuantMode::Mxfp8),
            (Dtype::Uint8, 4, 16) => Some(QuantMode::Nvfp4),
            (Dtype::Uint8, ..) => None,
            (_, 2 | 3 | 4 | 5 | 6 | 8, 32 | 64 | 128) => Some(QuantMode::Affine),
            _ => None,
        };
        let expected = shape.split_last().map_or(&[][..], |(_, rest)| rest);
        let fits = rest == expected && of_scales == expected;
        let whole = bits * columns == words * 32 && group_size * groups == columns;
        let Some(mode) = mode.filter(|_| fits && whole && packed.dtype() == Dtype::Uint32) else {
            let shapes = format!("{:?} with scales {:?}", packed.shape(), scales.shape());
            return Err(self.invalid(format!("{prefix}: {shapes} is no quantization of {shape:?}")));
        };
        let mut quantized =
            Quantized { packed, scales, biases: None, group_size, bits, mode, float: self.policy.float };
        if mode == QuantMode::Affine {
            let biases = self.remove(&format!("{prefix}.biases"))?;
            if biases.shape() != quantized.scales.shape() {
                return Err(self.invalid(format!("{prefix}: scales and biases differ in shape")));
            }
            quantized.scales = self.cast(prefix, &quantized.scales)?;
            quantized.biases = Some(self.cast(prefix, &biases)?);
        }
        self.parameters += shape.iter().map(|&size| u64::from(size.unsigned_abs())).product::<u64>();
        if self.policy.dequantize {
            return Ok(Matrix::Dense(quantized.dequantize()?));
        }
        Ok(Matrix::Quantized(quantized))
    }

    /// Takes the matrices `[experts, out, columns]` of all experts.
    pub(crate) fn expert_matrix(
        &mut self,
        prefix: &str,
        [experts, out, columns]: [i32; 3],
        bias: bool,
    ) -> Result<ExpertMatrix, Error> {
        let weight = self.matrices(prefix, &[experts, out, columns])?;
        let bias = if bias { Some(self.floats(&format!("{prefix}.bias"), &[experts, out])?) } else { None };
        Ok(ExpertMatrix { weight, bias })
    }

    /// Takes experts that are gated MLPs: gate_proj, up_proj and down_proj, stacked.
    pub(crate) fn gated_experts(
        &mut self,
        prefix: &str,
        [experts, hidden, inner]: [i32; 3],
        gate: Gate,
        bias: bool,
    ) -> Result<Experts, Error> {
        let shape = [experts, inner, hidden];
        let parts =
            ["gate_proj", "up_proj"].map(|part| self.expert_matrix(&format!("{prefix}.{part}"), shape, bias));
        let parts = parts.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(Experts {
            first: ExpertMatrix::fused(parts)?,
            last: self.expert_matrix(&format!("{prefix}.down_proj"), [experts, hidden, inner], bias)?,
            activation: Activation::Gated(gate),
            ops: self.policy.ops,
        })
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
        (hidden, inner): (i32, i32),
        gate: Gate,
        bias: bool,
    ) -> Result<Mlp, Error> {
        Ok(Mlp {
            gate_up: self.fused(prefix, &[("gate_proj", inner), ("up_proj", inner)], hidden, bias)?,
            down: self.linear(&format!("{prefix}.down_proj"), hidden, inner, bias)?,
            gate,
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

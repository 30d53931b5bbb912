//! Builders of layers: a [`TensorCursor`]'s methods that take a layer's tensors by name and make the layer of
//! them. Called by the architectures while a model loads.

use mlx_rs::Dtype;

use super::{Activation, ExpertMatrix, Experts, Fused, Linear, Matrix, Mlp, Quantized, RmsNorm};
use crate::error::Error;
use crate::mlx::ffi::Gate;
use crate::mlx::tensors::TensorCursor;
use crate::quantize::QuantMode;

impl TensorCursor {
    /// Takes a norm's weight.
    pub(crate) fn rms_norm(&mut self, prefix: &str, size: i32, eps: f32) -> Result<RmsNorm, Error> {
        self.rms_norm_at(&format!("{prefix}.weight"), size, eps)
    }

    /// Takes a norm's weight by its whole name.
    pub(crate) fn rms_norm_at(&mut self, name: &str, size: i32, eps: f32) -> Result<RmsNorm, Error> {
        let weight = self.floats(name, &[size])?;
        Ok(RmsNorm { weight, eps, kernels: self.kernels() })
    }

    /// Takes the matrix `[out, columns]` at `prefix`, quantized if it has scales there.
    pub(crate) fn matrix(&mut self, prefix: &str, out: i32, columns: i32) -> Result<Matrix, Error> {
        self.matrices(prefix, &[out, columns])
    }

    /// Takes a matrix, or a stack of them, of this shape `[.., out, columns]`. Bits, group size and mode
    /// follow from the shapes, as in mlx-lm (utils.py, infer_quant_config).
    pub(crate) fn matrices(&mut self, prefix: &str, shape: &[i32]) -> Result<Matrix, Error> {
        let name = format!("{prefix}.weight");
        self.note_matrix(prefix);
        if !self.has(&format!("{prefix}.scales")) {
            self.pack(prefix)?;
        }
        if !self.has(&format!("{prefix}.scales")) {
            return Ok(Matrix::Dense(self.floats(&name, shape)?));
        }
        let packed = self.take(&name)?;
        let scales = self.take(&format!("{prefix}.scales"))?;
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
            return Err(self.invalid(format!("{prefix}: {shapes} is not a quantization of {shape:?}")));
        };
        let policy = self.policy();
        let mut quantized = Quantized {
            packed,
            scales,
            biases: None,
            group_size,
            bits,
            mode,
            float: policy.float,
            kernels: policy.kernels,
        };
        if mode == QuantMode::Affine {
            let biases = self.take(&format!("{prefix}.biases"))?;
            if biases.shape() != quantized.scales.shape() {
                return Err(self.invalid(format!("{prefix}: scales and biases differ in shape")));
            }
            quantized.scales = self.cast(prefix, &quantized.scales)?;
            quantized.biases = Some(self.cast(prefix, &biases)?);
        }
        self.count(shape);
        if policy.dequantize {
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
            kernels: self.kernels(),
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
            kernels: self.kernels(),
        })
    }
}

//! A model's tensors while it loads: a cursor that hands each out once, checked against the shape that the
//! architecture expects. A missing tensor fails the load by name, and so does one that is left over.
//! `layers/build.rs` makes layers of what it hands out.
//!
//! Files are read lazily, tensor by tensor, when a taken array is evaluated; they are open and their headers
//! have been checked before (by `hub`), because MLX trusts them. Evaluation is begun here and goes on by
//! itself, on a stream of its own: nobody waits for it, neither the thread nor the steps of other models.

use std::collections::{BTreeSet, HashMap};

use mlx_rs::transforms::async_eval;
use mlx_rs::{Array, Dtype, Stream, ops, with_stream};

use crate::error::Error;
use crate::ids::ModelName;
use crate::mlx::ffi::{self, ReadFailure, TensorFile};
use crate::mlx::kernels::KernelSet;
use crate::mlx::rope::Rope;
use crate::quantize::QuantRule;

/// How stored tensors become a model's weights.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Policy {
    /// Dtype of all floats, scales included.
    pub(crate) float: Dtype,
    /// Whether quantized matrices are dequantized.
    pub(crate) dequantize: bool,
    /// Kernels of the layers.
    pub(crate) kernels: KernelSet,
}

/// How matrices that are stored as floats are quantized when they are taken.
pub(crate) struct Quantizing {
    pub(crate) rule: QuantRule,
    /// Dtype that floats have before; None: as stored.
    pub(crate) dtype: Option<Dtype>,
    /// Whether a tensor keeps its dtype nevertheless.
    pub(crate) keeps_dtype: Box<dyn Fn(&str) -> bool>,
    /// The stream that quantizes.
    pub(crate) on: Stream,
}

impl std::fmt::Debug for Quantizing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Quantizing").field("rule", &self.rule).finish_non_exhaustive()
    }
}

/// Tensors that have not been taken yet.
#[derive(Debug)]
pub(crate) struct TensorCursor {
    model: ModelName,
    policy: Policy,
    tensors: HashMap<String, Array>,
    /// Tensors of files that the index does not name: each counts where the others have none of its name.
    spare: HashMap<String, Array>,
    parameters: u64,
    /// Modules whose matrices were taken.
    matrices: BTreeSet<String>,
    quantizing: Option<Quantizing>,
    /// Whether tensors are taken to see that they fit, and none is read.
    is_dry: bool,
    /// Arrays that are being evaluated.
    reading: Vec<Array>,
    /// The first read that failed.
    failure: ReadFailure,
}

impl TensorCursor {
    /// Returns a cursor without tensors.
    pub(crate) fn new(model: &ModelName, policy: Policy) -> Self {
        Self {
            model: model.clone(),
            policy,
            tensors: HashMap::new(),
            spare: HashMap::new(),
            parameters: 0,
            matrices: BTreeSet::new(),
            quantizing: None,
            is_dry: false,
            reading: Vec::new(),
            failure: ReadFailure::default(),
        }
    }

    /// Returns a cursor that reads no tensor but those that must be compared: what takes from it learns
    /// whether names and shapes fit.
    pub(crate) fn dry(model: &ModelName, policy: Policy) -> Self {
        Self { is_dry: true, ..Self::new(model, policy) }
    }

    /// Has matrices quantized that are stored as floats.
    pub(crate) fn quantize(&mut self, quantizing: Quantizing) {
        self.quantizing = Some(quantizing);
    }

    /// Quantizes the matrix of a module that is stored as floats, if it is to be: puts elements, scales and
    /// biases in its place.
    pub(super) fn pack(&mut self, module: &str) -> Result<(), Error> {
        let name = format!("{module}.weight");
        let (Some(quantizing), Some(matrix)) = (&self.quantizing, self.tensors.get(&name)) else {
            return Ok(());
        };
        let columns = matrix.shape().last().and_then(|&columns| usize::try_from(columns).ok()).unwrap_or(0);
        let format = quantizing.rule.format(module, columns).filter(|_| is_float(matrix));
        let Some(format) = format else { return Ok(()) };
        let packed = with_stream(&quantizing.on, || ffi::quantize(&quantizing.cast(&name, matrix)?, format))?;
        let names = ["weight", "scales", "biases"].map(|kind| format!("{module}.{kind}"));
        self.tensors.extend(names.into_iter().zip(packed));
        Ok(())
    }

    /// Adds the tensors of a file of the model, which are read on the stream `on`. Spare files come last.
    pub(crate) fn add(&mut self, file: TensorFile, is_spare: bool, on: &Stream) -> Result<(), Error> {
        let mut read = ffi::load_safetensors(file, &self.failure, on)?;
        if is_spare {
            read.retain(|name, _| !self.tensors.contains_key(name));
            self.spare.extend(read);
        } else {
            self.tensors.extend(read);
        }
        Ok(())
    }

    /// Begins to evaluate arrays, and returns while they are read.
    pub(crate) fn begin<'a>(&mut self, arrays: impl IntoIterator<Item = &'a Array>) -> Result<(), Error> {
        if self.is_dry {
            return Ok(());
        }
        self.reading.extend(arrays.into_iter().cloned());
        if self.reading.is_empty() { Ok(()) } else { Ok(async_eval(&self.reading)?) }
    }

    /// Returns whether the arrays that were begun are still being read.
    ///
    /// # Errors
    /// Something of a file could not be read.
    pub(crate) fn is_reading(&mut self) -> Result<bool, Error> {
        for array in &self.reading {
            if !ffi::is_available(array)? {
                return Ok(true);
            }
        }
        self.reading.clear();
        match self.failure.get() {
            Some(why) => Err(self.invalid(why)),
            None => Ok(false),
        }
    }

    /// Returns where the first read that fails is noted, for whoever evaluates tensors without
    /// [`Self::begin`].
    pub(crate) fn failure(&self) -> ReadFailure {
        ReadFailure::clone(&self.failure)
    }

    /// Returns the number of parameters taken so far; packed ones count one by one.
    pub(crate) fn parameters(&self) -> u64 {
        self.parameters
    }

    /// Returns the modules whose matrices were taken, dense or quantized.
    pub(crate) fn matrices_taken(&self) -> &BTreeSet<String> {
        &self.matrices
    }

    /// Takes every tensor that is left, by name; a spare one where the others lack it.
    pub(crate) fn take_all(&mut self) -> HashMap<String, Array> {
        let mut all = std::mem::take(&mut self.spare);
        all.extend(std::mem::take(&mut self.tensors));
        all
    }

    /// Returns every array that it holds.
    pub(crate) fn into_arrays(mut self) -> Vec<Array> {
        let reading = std::mem::take(&mut self.reading);
        self.take_all().into_values().chain(reading).collect()
    }

    /// Returns an error that blames the model's files.
    pub(crate) fn invalid(&self, why: impl Into<String>) -> Error {
        Error::ModelInvalid { model: self.model.clone(), why: why.into() }
    }

    /// Drops tensors that the architecture does not use.
    pub(crate) fn discard(&mut self, unused: impl Fn(&str) -> bool) {
        self.tensors.retain(|name, _| !unused(name));
    }

    /// Drops layers from `first` on that predict further tokens, whose names begin with a prefix and their
    /// index. What tells them from the model's own layers is the projection of hidden state and next token.
    pub(crate) fn discard_predictors(&mut self, prefix: &str, first: usize) {
        let layer = |name: &str| {
            let (number, part) = name.strip_prefix(prefix)?.split_once('.')?;
            Some((number.parse::<usize>().ok().filter(|&layer| layer >= first)?, part == "eh_proj.weight"))
        };
        let found = self.tensors.keys().filter_map(|name| layer(name).filter(|(_, projects)| *projects));
        let predictors: Vec<usize> = found.map(|(layer, _)| layer).collect();
        self.discard(|name| layer(name).is_some_and(|(layer, _)| predictors.contains(&layer)));
    }

    /// Begins to read the frequencies of rotations that old exporters stored.
    pub(crate) fn begin_frequencies(&mut self) -> Result<(), Error> {
        self.change(is_frequencies, |array| array.as_dtype(Dtype::Float32))?;
        let stored = self.tensors.iter().filter(|(name, _)| is_frequencies(name));
        let stored: Vec<Array> = stored.map(|(_, array)| array.clone()).collect();
        self.begin(&stored)
    }

    /// Drops frequencies of rotations that old exporters stored, if they are those of `ropes`. They were read
    /// since [`Self::begin_frequencies`].
    pub(crate) fn discard_frequencies(&mut self, ropes: &[Rope]) -> Result<(), Error> {
        for (name, stored) in self.tensors.iter().filter(|(name, _)| is_frequencies(name)) {
            let stored = stored.to_vec_exact::<f32>().map_err(|error| self.invalid(error.to_string()))?;
            if !ropes.iter().any(|rope| rope.has_frequencies(&stored)) {
                let why = format!("{name} is not the rotation of config.json (rope_theta, rope_scaling)");
                return Err(self.invalid(why));
            }
        }
        self.discard(is_frequencies);
        Ok(())
    }

    /// Begins to compare the tensors of two modules.
    pub(crate) fn compare(&mut self, one: &str, other: &str) -> Result<Comparison, Error> {
        let mut equal = Vec::new();
        for kind in ["weight", "scales", "biases", "bias"] {
            let tensors = [one, other].map(|module| self.tensors.get(&format!("{module}.{kind}")));
            match tensors {
                [None, None] => {}
                [Some(a), Some(b)] if a.shape() == b.shape() && a.dtype() == b.dtype() => {
                    equal.push(ops::array_eq(a, b, None)?);
                }
                _ => return Ok(Comparison(None)),
            }
        }
        self.begin(&equal)?;
        Ok(Comparison(Some(equal)))
    }

    /// Renames tensors; None keeps a name.
    pub(crate) fn rename(&mut self, new_name: impl Fn(&str) -> Option<String>) {
        let tensors = std::mem::take(&mut self.tensors);
        let renamed = tensors.into_iter().map(|(name, array)| (new_name(&name).unwrap_or(name), array));
        self.tensors = renamed.collect();
    }

    /// Drops the vision and audio parts of a model with several parts, and renames tensors of the text part
    /// as if it stood alone.
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
            let all = (0..experts).map(|expert| self.take(&format!("{prefix}.{expert}.{part}.{kind}")));
            let all = all.collect::<Result<Vec<_>, _>>()?;
            self.tensors.insert(format!("{stack}.{kind}"), ops::stack(&all, 0)?);
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

    /// Puts tensors that are made of another one in its place; leaves all as they are if it does not exist.
    pub(crate) fn replace<const N: usize>(
        &mut self,
        name: &str,
        names: [String; N],
        make: impl Fn(&Array) -> mlx_rs::error::Result<[Array; N]>,
    ) -> Result<(), Error> {
        let Some(array) = self.tensors.get(name) else { return Ok(()) };
        let made = make(array).map_err(|error| self.invalid(format!("{name} {error}")))?;
        self.tensors.remove(name);
        self.tensors.extend(names.into_iter().zip(made));
        Ok(())
    }

    /// Whether a tensor exists and has not been taken.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Whether a tensor can be taken, be it from a file that the index does not name.
    pub(crate) fn can_take(&self, name: &str) -> bool {
        self.has(name) || self.spare.contains_key(name)
    }

    /// Returns the kernels of the layers.
    pub(crate) fn kernels(&self) -> KernelSet {
        self.policy.kernels
    }

    /// Returns how tensors become weights.
    pub(super) fn policy(&self) -> Policy {
        self.policy
    }

    /// Takes a float tensor of a known shape.
    pub(crate) fn floats(&mut self, name: &str, shape: &[i32]) -> Result<Array, Error> {
        let array = self.take(name)?;
        if array.shape() != shape {
            return Err(self.invalid(format!("{name} has shape {:?}, not {shape:?}", array.shape())));
        }
        self.parameters += array.size() as u64;
        self.cast(name, &array)
    }

    /// Takes a tensor of a known shape that computes in single precision whatever the model does.
    pub(crate) fn single(&mut self, name: &str, shape: &[i32]) -> Result<Array, Error> {
        let array = self.take(name)?;
        if array.shape() != shape {
            return Err(self.invalid(format!("{name} has shape {:?}, not {shape:?}", array.shape())));
        }
        self.parameters += array.size() as u64;
        Ok(array.as_dtype(Dtype::Float32)?)
    }

    /// Ends the load: fails if a tensor is left.
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

    /// Takes a tensor as it is stored.
    pub(super) fn take(&mut self, name: &str) -> Result<Array, Error> {
        let found = self.tensors.remove(name).or_else(|| self.spare.remove(name));
        let found = found.ok_or_else(|| self.invalid(format!("the tensor {name} is missing")))?;
        match &self.quantizing {
            Some(quantizing) if is_float(&found) => {
                Ok(with_stream(&quantizing.on, || quantizing.cast(name, &found))?)
            }
            Some(_) | None => Ok(found),
        }
    }

    /// Notes that a module's matrix is taken.
    pub(super) fn note_matrix(&mut self, module: &str) {
        self.matrices.insert(module.to_owned());
    }

    /// Counts parameters that were taken packed.
    pub(super) fn count(&mut self, shape: &[i32]) {
        self.parameters += shape.iter().map(|&size| u64::from(size.unsigned_abs())).product::<u64>();
    }

    /// Casts floats to the dtype of the policy.
    pub(super) fn cast(&self, name: &str, array: &Array) -> Result<Array, Error> {
        match array.dtype() {
            dtype if dtype == self.policy.float => Ok(array.clone()),
            Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16 => Ok(array.as_dtype(self.policy.float)?),
            other => Err(self.invalid(format!("{name} has dtype {other:?}, not a float"))),
        }
    }
}

fn is_frequencies(name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
}

/// Whether two modules have the same tensors, once it has been computed.
pub(crate) struct Comparison(Option<Vec<Array>>);

impl Comparison {
    /// Returns the result; it is there once nothing is being read.
    pub(crate) fn are_same(&self) -> Result<bool, Error> {
        let Some(equal) = &self.0 else { return Ok(false) };
        for part in equal {
            let same = part.try_item_exact::<bool>();
            if !same.map_err(|error| Error::Internal(format!("MLX: {error}")))? {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

impl Quantizing {
    /// Returns floats in the dtype that a conversion would store.
    fn cast(&self, name: &str, floats: &Array) -> mlx_rs::error::Result<Array> {
        match self.dtype.filter(|_| !(self.keeps_dtype)(name)) {
            Some(dtype) => floats.as_dtype(dtype),
            None => Ok(floats.clone()),
        }
    }
}

fn is_float(array: &Array) -> bool {
    matches!(array.dtype(), Dtype::Float32 | Dtype::Float16 | Dtype::Bfloat16)
}

/// Returns the bytes of arrays, for accounting.
pub(crate) fn bytes_of<'a>(arrays: impl IntoIterator<Item = &'a Array>) -> u64 {
    arrays.into_iter().map(|array| array.nbytes() as u64).sum()
}

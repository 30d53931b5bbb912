//! The decoder that all architectures share: an embedding, residuals in a row, a norm and a head. An
//! architecture defines the states and residuals of its layers where they differ from Llama's; loading piece
//! by piece and running are done here.

use mlx_rs::error::Result as MlxResult;
use mlx_rs::{Array, ops};

use super::config::Common;
use super::parts::Layer;
use super::{Loading, Model, Setup};
use crate::error::Error;
use crate::mlx::batch::{Batch, OutputRows};
use crate::mlx::kernels::KernelSet;
use crate::mlx::kv::{Kv, KvShape, LayerState, TokenState};
use crate::mlx::layers::{ForwardContext, Gate, Matrix, Mixture, Residual, RmsNorm, Rope, Sublayer};
use crate::mlx::tensors::{Comparison, TensorCursor};

/// One architecture with its configuration. The defaults are Llama's: an architecture writes what it does
/// otherwise.
pub(super) trait Architecture: Send {
    /// Returns the common part of its config.
    fn common(&self) -> &Common;

    /// Returns its embedding, last norm and head.
    fn ends(&self) -> EmbeddingAndHead {
        EmbeddingAndHead::new(self.common())
    }

    /// Returns the positions that a layer attends to at most; 0 is all.
    fn window(&self, _layer: usize) -> i32 {
        0
    }

    /// Returns the states that the layers keep of a sequence.
    fn states(&self) -> Vec<LayerState> {
        let Common { layers, attention, .. } = self.common();
        let state = |layer| TokenState { window: self.window(layer), ..*attention };
        (0..*layers).map(state).map(LayerState::Tokens).collect()
    }

    /// Brings the tensors to the names and shapes that are taken, and drops those that are not used.
    fn adapt(&self, _weights: &mut TensorCursor) -> Result<(), Error> {
        Ok(())
    }

    /// Takes the part that runs once a step before the layers.
    fn prelude(&self, _weights: &mut TensorCursor) -> Result<Option<Box<dyn Prelude>>, Error> {
        Ok(None)
    }

    /// Takes a layer.
    fn layer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Vec<Residual>, Error> {
        usual_layer(self, layer, weights)
    }

    /// Takes the sublayer that mixes tokens.
    fn mixer(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Box<dyn Sublayer>, Error> {
        Ok(Box::new(self.common().attention(layer, weights)?))
    }

    /// Takes the sublayer that each token goes through by itself: a mixture of experts, or an MLP.
    fn feed_forward(&self, layer: &Layer, weights: &mut TensorCursor) -> Result<Box<dyn Sublayer>, Error> {
        Ok(match self.mixture(layer, weights)? {
            Some(mixture) => Box::new(mixture),
            None => Box::new(self.common().mlp(layer, Gate::Silu, weights)?),
        })
    }

    /// Takes a layer's mixture of experts; None if the layer is dense.
    fn mixture(&self, _layer: &Layer, _weights: &mut TensorCursor) -> Result<Option<Mixture>, Error> {
        Ok(None)
    }
}

/// Takes a layer of two sublayers, mixer and feed-forward, each after a norm.
pub(super) fn usual_layer(
    architecture: &(impl Architecture + ?Sized),
    layer: &Layer,
    weights: &mut TensorCursor,
) -> Result<Vec<Residual>, Error> {
    let common = architecture.common();
    let mixer = architecture.mixer(layer, weights)?;
    let feed_forward = architecture.feed_forward(layer, weights)?;
    let before = common.norm(&layer.name("input_layernorm"), weights)?;
    let between = common.norm(&layer.name("post_attention_layernorm"), weights)?;
    Ok(vec![Residual::new(before, mixer), Residual::new(between, feed_forward)])
}

/// Computes once a step what all layers of a model read.
pub(super) trait Prelude: Send {
    /// Computes it from token ids `[tokens]` and their hidden states `[tokens, hidden]`.
    fn forward(&self, tokens: &Array, x: &Array) -> MlxResult<Array>;

    /// Returns every array of its weights.
    fn arrays(&self) -> Vec<&Array>;
}

/// Embedding, last norm and head: sizes, modules and factors.
#[derive(Clone, Debug)]
pub(super) struct EmbeddingAndHead {
    pub(super) hidden: i32,
    pub(super) vocabulary: i32,
    /// The embedding's module.
    pub(super) embedding: &'static str,
    /// The last norm's module.
    pub(super) norm: &'static str,
    pub(super) norm_eps: f32,
    /// Whether the norm's weights are stored less 1.
    pub(super) norm_plus_one: bool,
    /// Whether the embedding serves as head; None: if the files have no other, or the same again.
    pub(super) tied: Option<bool>,
    /// Factor of embedded tokens.
    pub(super) embedding_scale: f32,
    /// Factor of logits.
    pub(super) logit_scale: f32,
    /// Logits become `softcap * tanh(logit / softcap)`; 0 is off.
    pub(super) softcap: f32,
}

impl EmbeddingAndHead {
    /// Returns the usual modules, with factors of 1.
    pub(super) fn new(common: &Common) -> Self {
        Self {
            hidden: common.hidden,
            vocabulary: common.vocabulary,
            embedding: "model.embed_tokens",
            norm: "model.norm",
            norm_eps: common.eps,
            norm_plus_one: false,
            tied: common.tied,
            embedding_scale: 1.0,
            logit_scale: 1.0,
            softcap: 0.0,
        }
    }

    /// Begins to compare a head with the embedding, if it may be that once more.
    fn compare_head(&self, weights: &mut TensorCursor) -> Result<Option<Comparison>, Error> {
        if self.tied == Some(false) || !weights.has(&format!("{HEAD}.weight")) {
            return Ok(None);
        }
        weights.compare(HEAD, self.embedding).map(Some)
    }

    /// Drops a head that is the embedding once more. Another one is the model's, unless the config ties it.
    fn drop_repeated_head(&self, head: &Comparison, weights: &mut TensorCursor) -> Result<(), Error> {
        if head.are_same()? {
            weights.discard(|name| name.strip_prefix(HEAD).is_some_and(|rest| rest.starts_with('.')));
        } else if self.tied == Some(true) {
            let why = "config.json: tie_word_embeddings is true, but lm_head.weight is not the embedding";
            return Err(weights.invalid(why));
        }
        Ok(())
    }

    /// Takes the head; None if the embedding serves as head.
    fn head(&self, weights: &mut TensorCursor) -> Result<Option<Matrix>, Error> {
        let name = format!("{HEAD}.weight");
        if !weights.has(&name) && self.tied != Some(false) {
            return Ok(None);
        }
        if !weights.can_take(&name) {
            let why = "config.json: tie_word_embeddings is false, but lm_head.weight is missing";
            return Err(weights.invalid(why));
        }
        weights.matrix(HEAD, self.vocabulary, self.hidden).map(Some)
    }
}

/// The head's module, where it has one.
const HEAD: &str = "lm_head";

struct Decoder {
    ends: EmbeddingAndHead,
    ropes: Vec<Rope>,
    prelude: Option<Box<dyn Prelude>>,
    embedding: Matrix,
    residuals: Vec<Residual>,
    norm: RmsNorm,
    /// None if the embedding serves as head.
    head: Option<Matrix>,
}

/// How far a load is: what it has to look at is read before anything is taken, so that nobody waits for it.
enum Stage {
    /// Nothing was begun.
    New,
    /// Stored frequencies of rotations are being read.
    Frequencies,
    /// The head is being compared with the embedding, if there is a need.
    Head(Option<Comparison>),
    /// Tensors are taken.
    Tensors,
}

/// Takes tensors: the embedding, then layer by layer, then norm and head.
struct Loader<A> {
    architecture: A,
    setup: Setup,
    stage: Stage,
    embedding: Option<Matrix>,
    prelude: Option<Box<dyn Prelude>>,
    residuals: Vec<Residual>,
    done: usize,
    /// Everything, once it is taken.
    decoder: Option<Decoder>,
}

/// Returns a loader of this architecture.
pub(super) fn loader<A: Architecture + 'static>(architecture: A, setup: Setup) -> Box<dyn Loading> {
    Box::new(Loader {
        architecture,
        setup,
        stage: Stage::New,
        embedding: None,
        prelude: None,
        residuals: Vec::new(),
        done: 0,
        decoder: None,
    })
}

impl<A: Architecture> Loader<A> {
    /// Brings the tensors to the names and shapes that mlx-lm writes, once stored frequencies are read, and
    /// begins to compare the head.
    fn rename(&self, weights: &mut TensorCursor) -> Result<Option<Comparison>, Error> {
        weights.discard_frequencies(&self.architecture.common().ropes)?;
        weights.take_text_part();
        self.architecture.adapt(weights)?;
        self.architecture.ends().compare_head(weights)
    }
}

impl<A: Architecture> Loading for Loader<A> {
    fn adapt(&self, weights: &mut TensorCursor) -> Result<(), Error> {
        weights.begin_frequencies()?;
        let head = self.rename(weights)?;
        head.map_or(Ok(()), |head| self.architecture.ends().drop_repeated_head(&head, weights))
    }

    fn next(&mut self, weights: &mut TensorCursor) -> Result<Option<Box<dyn Model>>, Error> {
        if let Some(decoder) = self.decoder.take() {
            return Ok(Some(Box::new(decoder)));
        }
        let ends = self.architecture.ends();
        match std::mem::replace(&mut self.stage, Stage::Tensors) {
            Stage::New => {
                weights.begin_frequencies()?;
                self.stage = Stage::Frequencies;
                return Ok(None);
            }
            Stage::Frequencies => {
                self.stage = Stage::Head(self.rename(weights)?);
                return Ok(None);
            }
            Stage::Head(Some(head)) => ends.drop_repeated_head(&head, weights)?,
            Stage::Head(None) | Stage::Tensors => {}
        }
        let Some(embedding) = &self.embedding else {
            let embedding = weights.matrix(ends.embedding, ends.vocabulary, ends.hidden)?;
            weights.begin(embedding.arrays())?;
            self.embedding = Some(embedding);
            self.prelude = self.architecture.prelude(weights)?;
            return Ok(None);
        };
        if self.done < self.architecture.common().layers {
            let residuals = self.architecture.layer(&Layer::new(self.done), weights)?;
            weights.begin(residuals.iter().flat_map(Residual::arrays))?;
            self.residuals.extend(residuals);
            self.done += 1;
            return Ok(None);
        }
        let norm = weights.rms_norm(ends.norm, ends.hidden, ends.norm_eps)?;
        let norm = if ends.norm_plus_one { norm.plus_one()? } else { norm };
        let head = ends.head(weights)?;
        weights.finish()?;
        let decoder = Decoder {
            ropes: self.architecture.common().ropes.clone(),
            prelude: self.prelude.take(),
            embedding: embedding.clone(),
            residuals: std::mem::take(&mut self.residuals),
            norm,
            head,
            ends,
        };
        weights.begin(decoder.arrays())?;
        self.decoder = Some(decoder);
        Ok(None)
    }

    fn pieces(&self) -> usize {
        self.layers() + 4
    }

    fn layers(&self) -> usize {
        self.architecture.common().layers
    }

    fn kv_shape(&self) -> KvShape {
        let Setup { dtype, int8_kv: int8, .. } = self.setup;
        KvShape { layers: self.architecture.states(), dtype, int8 }
    }
}

fn scaled(x: Array, scale: f32) -> MlxResult<Array> {
    if scale == 1.0 { Ok(x) } else { x.multiply(Array::from_f32(scale).as_dtype(x.dtype())?) }
}

impl Decoder {
    fn logits(&self, normed: &Array) -> MlxResult<Array> {
        let logits = self.head.as_ref().unwrap_or(&self.embedding).project(normed)?;
        let logits = scaled(logits, self.ends.logit_scale)?;
        if self.ends.softcap == 0.0 {
            return Ok(logits);
        }
        let cap = Array::from_f32(self.ends.softcap).as_dtype(logits.dtype())?;
        ops::tanh(logits.divide(&cap)?)?.multiply(&cap)
    }
}

impl Model for Decoder {
    fn forward(&self, batch: &Batch, kv: &mut Kv, attention: KernelSet) -> MlxResult<Option<Array>> {
        let rotations =
            self.ropes.iter().map(|rope| (rope.clone(), attention.rotation(rope, &batch.positions)));
        let rotations: Vec<_> = rotations.collect();
        let mut x = scaled(self.embedding.rows(&batch.tokens)?, self.ends.embedding_scale)?;
        let prelude = self.prelude.as_ref().map(|prelude| prelude.forward(&batch.tokens, &x)).transpose()?;
        let mut context = ForwardContext { batch, kv, kernels: attention, ropes: &rotations, prelude };
        let mut normed = None;
        for (index, residual) in self.residuals.iter().enumerate() {
            let next = self.residuals.get(index + 1);
            // The norm of the next residual; the last norm is of the output rows only.
            let next = next.map_or(Some(&self.norm), |next| next.before.as_ref());
            (x, normed) = residual.forward(&x, normed, next, &mut context)?;
        }
        let normed = match (&batch.outputs, normed) {
            (None, _) => return Ok(None),
            (Some(OutputRows::All), Some(normed)) => normed,
            (Some(OutputRows::All), None) => self.norm.forward(&x)?,
            (Some(OutputRows::Rows(rows)), _) => self.norm.forward(&x.take_axis(rows, 0)?)?,
        };
        self.logits(&normed).map(Some)
    }

    fn arrays(&self) -> Vec<&Array> {
        let residuals = self.residuals.iter().flat_map(Residual::arrays);
        let ends = self.embedding.arrays().into_iter().chain(self.head.iter().flat_map(Matrix::arrays));
        let prelude = self.prelude.iter().flat_map(|prelude| prelude.arrays());
        residuals.chain(ends).chain(prelude).chain([&self.norm.weight]).collect()
    }
}

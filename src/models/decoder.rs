//! What all architectures share: a decoder is an embedding, residuals in a row, a norm and a head. An architecture says
//! what its layers keep and which residuals they have; loading piece by piece and running are done here.

use mlx_rs::error::Result;
use mlx_rs::transforms::eval;
use mlx_rs::{Array, ops};

use super::{Loading, Model, Setup};
use crate::error::Error;
use crate::mlx::batch::Batch;
use crate::mlx::kernels::KernelSet;
use crate::mlx::kv::{Kv, KvShape, LayerState};
use crate::mlx::layers::{ForwardContext, Matrix, Residual, RmsNorm, Rope};
use crate::mlx::tensors::TensorCursor;

/// One architecture with its configuration.
pub(crate) trait Architecture {
    /// What is at both ends of the layers.
    fn ends(&self) -> EmbeddingAndHead;

    /// What each layer keeps of a sequence.
    fn states(&self) -> Vec<LayerState>;

    /// How many pieces the layers are loaded in.
    fn layers(&self) -> usize;

    /// The kinds of rotation that the residuals name by their index.
    fn ropes(&self) -> Vec<Rope>;

    /// Brings the tensors to the names and shapes that are taken, and drops what is not used.
    fn adapt(&self, weights: &mut TensorCursor) -> std::result::Result<(), Error>;

    /// Takes a layer.
    fn layer(&self, index: usize, weights: &mut TensorCursor) -> std::result::Result<Vec<Residual>, Error>;

    /// Takes what runs once a step before the layers.
    fn prelude(&self, _weights: &mut TensorCursor) -> std::result::Result<Option<Box<dyn Prelude>>, Error> {
        Ok(None)
    }
}

/// What a model computes once a step for all of its layers.
pub(crate) trait Prelude {
    /// Of token ids `[tokens]` and their hidden states `[tokens, hidden]`.
    fn forward(&self, tokens: &Array, x: &Array) -> Result<Array>;

    /// Every array of its weights.
    fn arrays(&self) -> Vec<&Array>;
}

/// Embedding and head.
#[derive(Clone, Debug)]
pub(crate) struct EmbeddingAndHead {
    pub(crate) hidden: i32,
    pub(crate) vocabulary: i32,
    /// The embedding's module.
    pub(crate) embedding: &'static str,
    /// The last norm's module.
    pub(crate) norm: &'static str,
    pub(crate) norm_eps: f32,
    /// The norm's weights are stored less 1.
    pub(crate) norm_plus_one: bool,
    /// The head's module; None if the embedding serves.
    pub(crate) head: Option<&'static str>,
    /// What embedded tokens are multiplied with.
    pub(crate) embedding_scale: f32,
    /// What logits are multiplied with.
    pub(crate) logit_scale: f32,
    /// Logits become `softcap * tanh(logit / softcap)`; 0 is off.
    pub(crate) softcap: f32,
}

impl EmbeddingAndHead {
    /// The usual names, with nothing done to embedding and logits.
    pub(crate) fn new(hidden: i32, vocabulary: i32, norm_eps: f32, tied: bool) -> Self {
        Self {
            hidden,
            vocabulary,
            embedding: "model.embed_tokens",
            norm: "model.norm",
            norm_eps,
            norm_plus_one: false,
            head: if tied { None } else { Some("lm_head") },
            embedding_scale: 1.0,
            logit_scale: 1.0,
            softcap: 0.0,
        }
    }
}

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

/// Takes tensors: the embedding, then layer by layer, then norm and head.
struct Loader<A> {
    architecture: A,
    setup: Setup,
    embedding: Option<Matrix>,
    prelude: Option<Box<dyn Prelude>>,
    residuals: Vec<Residual>,
    done: usize,
}

/// Gets ready to load.
pub(crate) fn loader<A: Architecture + 'static>(architecture: A, setup: Setup) -> Box<dyn Loading> {
    Box::new(Loader { architecture, setup, embedding: None, prelude: None, residuals: Vec::new(), done: 0 })
}

impl<A: Architecture> Loading for Loader<A> {
    fn next(&mut self, weights: &mut TensorCursor) -> std::result::Result<Option<Box<dyn Model>>, Error> {
        let ends = self.architecture.ends();
        let Some(embedding) = &self.embedding else {
            weights.discard(|name| name.contains("rotary_emb.inv_freq"));
            weights.take_text_part();
            self.architecture.adapt(weights)?;
            if ends.head.is_none() {
                weights.discard(|name| name.starts_with("lm_head."));
            }
            let embedding = weights.matrix(ends.embedding, ends.vocabulary, ends.hidden)?;
            eval(embedding.arrays())?;
            self.embedding = Some(embedding);
            self.prelude = self.architecture.prelude(weights)?;
            return Ok(None);
        };
        if self.done < self.architecture.layers() {
            let residuals = self.architecture.layer(self.done, weights)?;
            eval(residuals.iter().flat_map(Residual::arrays))?;
            self.residuals.extend(residuals);
            self.done += 1;
            return Ok(None);
        }
        let norm = weights.rms_norm(ends.norm, ends.hidden, ends.norm_eps)?;
        let norm = if ends.norm_plus_one { norm.plus_one()? } else { norm };
        let head = ends.head.map(|head| weights.matrix(head, ends.vocabulary, ends.hidden)).transpose()?;
        weights.finish()?;
        let model = Decoder {
            ropes: self.architecture.ropes(),
            prelude: self.prelude.take(),
            embedding: embedding.clone(),
            residuals: std::mem::take(&mut self.residuals),
            norm,
            head,
            ends,
        };
        eval(model.arrays())?;
        Ok(Some(Box::new(model)))
    }

    fn pieces(&self) -> usize {
        self.architecture.layers() + 2
    }

    fn kv_shape(&self) -> KvShape {
        let Setup { dtype, ops, int8_kv } = self.setup;
        KvShape::new(self.architecture.states(), dtype, int8_kv, ops)
    }
}

fn scaled(x: Array, scale: f32) -> Result<Array> {
    if scale == 1.0 { Ok(x) } else { x.multiply(Array::from_f32(scale).as_dtype(x.dtype())?) }
}

impl Decoder {
    fn logits(&self, normed: &Array) -> Result<Array> {
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
    fn forward(&self, batch: &Batch, kv: &mut Kv) -> Result<Option<Array>> {
        let ops: KernelSet = kv.shape().ops;
        let turned = self.ropes.iter().map(|rope| (rope.clone(), rope.rotation(&batch.positions, ops)));
        let turned: Vec<_> = turned.collect();
        let mut x = scaled(self.embedding.rows(&batch.tokens)?, self.ends.embedding_scale)?;
        let prelude = self.prelude.as_ref().map(|prelude| prelude.forward(&batch.tokens, &x)).transpose()?;
        let mut context = ForwardContext { batch, kv, ropes: &turned, prelude };
        let mut normed = None;
        for (index, residual) in self.residuals.iter().enumerate() {
            let next = self.residuals.get(index + 1);
            // The norm of what comes next; the last one is taken of the rows that are wanted only.
            let next = next.map_or(Some(&self.norm), |next| next.before.as_ref());
            (x, normed) = residual.forward(&x, normed, next, &mut context)?;
        }
        let Some(rows) = &batch.outputs else { return Ok(None) };
        let normed = match normed.filter(|_| rows.dim(0) == x.dim(0)) {
            Some(normed) => normed,
            None => self.norm.forward(&x.take_axis(rows, 0)?)?,
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

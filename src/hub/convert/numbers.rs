//! The numbers of a model in a GGUF file, by llama.cpp's names (gguf-py, constants.py), for the architectures
//! that can be converted.

use super::super::HubError;
use super::gguf::{Gguf, single};

/// No model is wider; a row of 2^20 weights is 4 MB in f32, which bounds the memory of a conversion.
const WIDTH_MAX: u64 = 1 << 20;

/// An architecture that can be converted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Llama,
    /// Llama with experts, as llama.cpp stores Mixtral.
    Mixtral,
    Qwen2,
    Qwen2Moe,
    Qwen3,
    Qwen3Moe,
    Gemma3,
    Phi3,
}

/// The numbers of a model.
#[derive(Debug)]
pub(super) struct Numbers {
    /// llama.cpp's name of the architecture.
    pub(super) architecture: String,
    pub(super) family: Family,
    pub(super) layers: u64,
    pub(super) hidden: usize,
    pub(super) feed_forward: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    /// Elements of a head that rotate.
    pub(super) rotated: usize,
    pub(super) vocab: usize,
    pub(super) context_length: u64,
    /// Window of attention; 0 is none.
    pub(super) window: u64,
    pub(super) norm_eps: f64,
    pub(super) rope_base: f64,
    /// Context length that a scaling of the rotation starts from.
    pub(super) rope_original: u64,
    pub(super) experts: Option<Experts>,
    pub(super) biases: Biases,
    pub(super) tied: bool,
}

/// Which projections have biases: all of a group, or none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Biases {
    /// Queries, keys and values.
    pub(super) qkv: bool,
    /// What attention returns.
    pub(super) output: bool,
    pub(super) mlp: bool,
}

/// Sizes of a mixture of experts.
#[derive(Clone, Copy, Debug)]
pub(super) struct Experts {
    pub(super) count: usize,
    /// Experts of a token.
    pub(super) used: usize,
    /// Inner size of one.
    pub(super) inner: usize,
    /// Inner size of the expert that every token goes through; 0 without one.
    pub(super) shared: usize,
}

impl Family {
    fn of(gguf: &Gguf) -> Result<(Self, &str), HubError> {
        let Some(name) = gguf.text("general.architecture")? else {
            return Err(gguf.damaged("names no architecture"));
        };
        let has_experts = gguf.uint(&format!("{name}.expert_count"))?.unwrap_or(0) > 0;
        let family = match name {
            "llama" if has_experts => Self::Mixtral,
            "llama" => Self::Llama,
            "qwen2" => Self::Qwen2,
            "qwen2moe" => Self::Qwen2Moe,
            "qwen3" => Self::Qwen3,
            "qwen3moe" => Self::Qwen3Moe,
            "gemma3" => Self::Gemma3,
            "phi3" => Self::Phi3,
            other => {
                let why = format!(
                    "the GGUF file's architecture is {other:?}; llama, qwen2, qwen2moe, qwen3, qwen3moe, gemma3 \
                     and phi3 can be converted"
                );
                return Err(HubError::unsupported(why));
            }
        };
        Ok((family, name))
    }

    pub(super) fn has_experts(self) -> bool {
        matches!(self, Self::Mixtral | Self::Qwen2Moe | Self::Qwen3Moe)
    }

    /// Whether the converter moves rows of q and k within each head (`LlamaModel.permute`).
    pub(super) fn permutes(self) -> bool {
        matches!(self, Self::Llama | Self::Mixtral)
    }

    /// Whether queries and keys have norms.
    pub(super) fn has_head_norms(self) -> bool {
        matches!(self, Self::Qwen3 | Self::Qwen3Moe | Self::Gemma3)
    }
}

/// Reads numbers of one architecture.
struct Keys<'a> {
    gguf: &'a Gguf,
    architecture: &'a str,
}

impl Keys<'_> {
    fn name(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    /// A size, which must be there.
    fn size(&self, key: &str) -> Result<usize, HubError> {
        let missing = || self.gguf.damaged(format!("has no {}", self.name(key)));
        self.size_if(key)?.ok_or_else(missing)
    }

    fn size_if(&self, key: &str) -> Result<Option<usize>, HubError> {
        match self.gguf.uint(&self.name(key))? {
            None => Ok(None),
            Some(value) if (1..=WIDTH_MAX).contains(&value) => {
                Ok(Some(usize::try_from(value).unwrap_or(usize::MAX)))
            }
            Some(value) => Err(self.gguf.damaged(format!("{} cannot be {value}", self.name(key)))),
        }
    }

    fn experts(&self, family: Family, feed_forward: Option<usize>) -> Result<Option<Experts>, HubError> {
        if !family.has_experts() {
            if self.gguf.uint(&self.name("expert_count"))?.unwrap_or(0) > 0 {
                let why = format!("mixtures of experts cannot be converted from {:?}", self.architecture);
                return Err(HubError::unsupported(why));
            }
            return Ok(None);
        }
        let scale = self.gguf.float(&self.name("expert_weights_scale"))?.unwrap_or(1.0);
        if scale != 1.0 && scale != 0.0 {
            return Err(HubError::unsupported(format!("experts whose weights are scaled by {scale}")));
        }
        let own = match self.size_if("expert_feed_forward_length")? {
            Some(own) => own,
            None => feed_forward.map_or_else(|| self.size("feed_forward_length"), Ok)?,
        };
        let shared = match family {
            Family::Qwen2Moe => self.size("expert_shared_feed_forward_length")?,
            _ => 0,
        };
        let (count, used) = (self.size("expert_count")?, self.size("expert_used_count")?);
        Ok(Some(Experts { count, used, inner: own, shared }))
    }
}

impl Numbers {
    pub(super) fn read(gguf: &Gguf) -> Result<Self, HubError> {
        let (family, architecture) = Family::of(gguf)?;
        let keys = Keys { gguf, architecture };
        let (hidden, heads) = (keys.size("embedding_length")?, keys.size("attention.head_count")?);
        let kv_heads = keys.size_if("attention.head_count_kv")?.unwrap_or(heads);
        let usual = if family == Family::Gemma3 { 256 } else { hidden / heads };
        let head_dim = keys.size_if("attention.key_length")?.unwrap_or(usual);
        let rotated = keys.size_if("rope.dimension_count")?.unwrap_or(head_dim);
        let value = keys.size_if("attention.value_length")?.unwrap_or(head_dim);
        let rotates = rotated == head_dim || family == Family::Phi3 && rotated < head_dim;
        if !rotates || value != head_dim || head_dim < 2 || head_dim % 2 != 0 || rotated % 2 != 0 {
            let why = format!("heads of {head_dim}, of which {rotated} rotate, with values of {value}");
            return Err(HubError::unsupported(why));
        }
        if heads % kv_heads != 0 {
            return Err(gguf.damaged(format!("has {heads} heads for {kv_heads} key heads")));
        }
        let feed_forward = keys.size_if("feed_forward_length")?;
        let experts = keys.experts(family, feed_forward)?;
        let inner = feed_forward.or(experts.map(|experts| experts.inner));
        let feed_forward = inner.map_or_else(|| keys.size("feed_forward_length"), Ok)?;
        let embedding = gguf.tensors.get("token_embd.weight");
        let context_length = gguf.uint(&keys.name("context_length"))?.unwrap_or(2048);
        let original = gguf.uint(&keys.name("rope.scaling.original_context_length"))?;
        for softcap in ["attn_logit_softcapping", "final_logit_softcapping"] {
            if gguf.float(&keys.name(softcap))?.unwrap_or(0.0) > 0.0 {
                return Err(HubError::unsupported(format!("{} cannot be converted", keys.name(softcap))));
            }
        }
        Ok(Self {
            architecture: architecture.to_owned(),
            family,
            layers: keys.size("block_count")? as u64,
            hidden,
            feed_forward,
            heads,
            kv_heads,
            head_dim,
            rotated,
            vocab: embedding.and_then(|tensor| tensor.dims.get(1).copied()).unwrap_or(0),
            context_length,
            window: gguf.uint(&keys.name("attention.sliding_window"))?.unwrap_or(0),
            norm_eps: single(gguf.float(&keys.name("attention.layer_norm_rms_epsilon"))?.unwrap_or(1e-5)),
            rope_base: single(gguf.float(&keys.name("rope.freq_base"))?.unwrap_or(10000.0)),
            rope_original: original.unwrap_or(context_length),
            experts,
            biases: Biases::read(gguf, family, architecture)?,
            tied: !gguf.tensors.contains_key("output.weight"),
        })
    }
}

impl Biases {
    /// Reads which projections of the first layer have biases. Others must have the same, or are refused
    /// when their tensors are collected.
    fn read(gguf: &Gguf, family: Family, architecture: &str) -> Result<Self, HubError> {
        const QKV: [&str; 3] = ["attn_q", "attn_k", "attn_v"];
        const OUTPUT: [&str; 1] = ["attn_output"];
        const MLP: [&str; 3] = ["ffn_gate", "ffn_up", "ffn_down"];
        let has = |part: &&str| gguf.tensors.contains_key(&format!("blk.0.{part}.bias"));
        let found: Vec<&str> = QKV.into_iter().chain(OUTPUT).chain(MLP).filter(has).collect();
        let biases = Self { qkv: has(&QKV[0]), output: has(&OUTPUT[0]), mlp: has(&MLP[0]) };
        let fits = match family {
            // The config says both by keys of their own: `attention_bias` is that of all four.
            Family::Llama => biases.qkv == biases.output,
            Family::Qwen2 | Family::Qwen2Moe => biases.qkv && !biases.output && !biases.mlp,
            Family::Mixtral | Family::Qwen3 | Family::Qwen3Moe | Family::Gemma3 | Family::Phi3 => {
                found.is_empty()
            }
        };
        let groups = [(&QKV[..], biases.qkv), (&OUTPUT, biases.output), (&MLP, biases.mlp)];
        let said: Vec<&str> =
            groups.iter().filter(|(_, are)| *are).flat_map(|(parts, _)| *parts).copied().collect();
        if fits && found == said {
            return Ok(biases);
        }
        let found = if found.is_empty() { "none".to_owned() } else { found.join(", ") };
        Err(HubError::unsupported(format!("no config of {architecture} has these biases: {found}")))
    }
}

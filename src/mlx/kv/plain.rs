//! Parked caches as plain data: what a snapshot stores of them, and caches made of it again.

use std::any::Any;
use std::sync::Arc;

use mlx_rs::error::Exception;
use mlx_rs::{Array, Dtype};

use super::shape::ArrayShape;
use super::{Kv, KvShape, own};
use crate::backend::{
    BuildKv, ImportError, Importing, KvArray, KvArrays, KvBuilding, KvContent, KvElement, KvLayout, KvPart,
    KvSegment, ParkedId, check_segments,
};
use crate::error::Error;
use crate::mlx::dim;
use crate::mlx::ffi::{self, HostArrays};

impl KvShape {
    /// Returns the arrays of a cache as plain data.
    ///
    /// # Errors
    /// One has elements of a type that no cache has.
    pub(crate) fn layout(&self) -> Result<KvLayout, Exception> {
        let arrays = self.arrays();
        let arrays = arrays.iter().flatten().map(|array| match array {
            ArrayShape::PerToken { heads, elements, dtype } => {
                let (heads, elements) = (heads.unsigned_abs(), elements.unsigned_abs());
                Ok::<_, Exception>(KvArray::PerToken { heads, elements, element: element(*dtype)? })
            }
            ArrayShape::PerSequence(state) => {
                let shape = state.shape.iter().map(|of| of.unsigned_abs()).collect();
                Ok(KvArray::PerSequence { shape, element: element(state.dtype)? })
            }
        });
        Ok(KvLayout { arrays: arrays.collect::<Result<_, Exception>>()? })
    }
}

impl Kv {
    /// Returns the segments of a parked cache, each with the checkpoints of the cache in it.
    ///
    /// # Errors
    /// The device failed.
    pub(crate) fn export(&self, id: ParkedId) -> Result<Vec<KvSegment>, Exception> {
        let is_recurrent = self.shape.is_recurrent();
        let segments = self.parked.content(id, u32::MAX).map(|(tokens, content)| {
            let inside = |length: u32| is_recurrent && tokens.start < length && length <= tokens.end;
            let saved = self.parked.states(id).filter(|(length, _)| inside(*length));
            let states = saved.map(|(length, states)| Ok::<_, Exception>((length, shown(states)?)));
            Ok(KvSegment {
                tokens: tokens.clone(),
                content: shown(content)?,
                states: states.collect::<Result<_, Exception>>()?,
            })
        });
        segments.collect()
    }

    /// Makes a parked cache of segments, if they are those of this model.
    pub(crate) fn import(&mut self, importing: Importing) -> Result<(), ImportError> {
        let Importing { id, base, segments } = importing;
        let start = base.map_or(0, |base| base.tokens);
        check_segments(start, &segments)?;
        let ends_there = |base| self.parked.stretches(base).any(|stretch| stretch.tokens.end == start);
        if base.is_some_and(|base| !ends_there(base.id)) {
            return Err(ImportError::Unfit(format!("nothing that is parked ends at {start}")));
        }
        let layout = self.shape.layout().map_err(Error::from)?;
        let of_base = base.into_iter().flat_map(|base| self.parked.states(base.id));
        let of_base = of_base.filter(|(length, _)| *length <= start);
        let mut states: Vec<_> = of_base.map(|(length, states)| (length, states.clone())).collect();
        let mut parts = Vec::with_capacity(segments.len());
        for KvSegment { tokens, content, states: saved } in segments {
            parts.push((tokens.end, taken(&content, &layout, KvPart::Tokens, tokens.end - tokens.start)?));
            if !saved.is_empty() && !layout.is_recurrent() {
                return Err(ImportError::Unfit("states, which the model has not".into()));
            }
            for (length, content) in saved {
                states.push((length, taken(&content, &layout, KvPart::States, 0)?));
            }
        }
        self.parked.add_parts(id, base, parts, states);
        Ok(())
    }
}

/// Returns arrays so that other threads can read them. Where that would move their bytes while a step reads
/// them, it is a copy.
fn shown(arrays: &[Array]) -> Result<KvContent, Exception> {
    let arrays =
        if ffi::on_cuda() { arrays.iter().map(own).collect::<Result<Vec<_>, _>>()? } else { arrays.to_vec() };
    Ok(Arc::new(HostArrays::new(arrays)?))
}

/// Returns the arrays of a part, if they are what the layout says.
fn taken(
    content: &KvContent,
    layout: &KvLayout,
    part: KvPart,
    tokens: u32,
) -> Result<Vec<Array>, ImportError> {
    let content: &dyn Any = &**content;
    let Some(arrays) = content.downcast_ref::<HostArrays>() else {
        return Err(ImportError::Unfit("the arrays of another device".into()));
    };
    let wanted = layout.of(part).map(|array| (dims(array, tokens), dtype(array.element())));
    let same = arrays.shapes().map(|(shape, dtype)| (shape.to_vec(), dtype)).eq(wanted);
    if !same {
        return Err(ImportError::Unfit(format!("arrays that {tokens} tokens of it do not have")));
    }
    Ok(arrays.handles())
}

impl KvArrays for HostArrays {
    fn bytes(&self) -> Result<Vec<&[u8]>, Error> {
        Ok(HostArrays::bytes(self)?)
    }
}

/// Makes arrays in MLX's memory.
#[derive(Debug)]
pub(crate) struct ArrayBuilder;

impl BuildKv for ArrayBuilder {
    fn begin(&self) -> Box<dyn KvBuilding> {
        Box::new(Building(Vec::new()))
    }
}

struct Building(Vec<Array>);

impl KvBuilding for Building {
    fn add(&mut self, array: &KvArray, tokens: u32, bytes: &[u8]) -> Result<(), Error> {
        let needed_bytes = bytes.len() as u64;
        // MLX does not ask whether there is memory.
        let available_bytes = ffi::available(needed_bytes);
        if available_bytes < needed_bytes {
            return Err(Error::KvShortage { needed_bytes, available_bytes });
        }
        self.0.push(ffi::array_of(bytes, &dims(array, tokens), dtype(array.element()))?);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<KvContent, Error> {
        Ok(Arc::new(HostArrays::new(self.0)?))
    }
}

fn dims(array: &KvArray, tokens: u32) -> Vec<i32> {
    array.shape(tokens).into_iter().map(dim).collect()
}

fn element(dtype: Dtype) -> Result<KvElement, Exception> {
    match dtype {
        Dtype::Float32 => Ok(KvElement::Float32),
        Dtype::Float16 => Ok(KvElement::Float16),
        Dtype::Bfloat16 => Ok(KvElement::Bfloat16),
        Dtype::Int8 => Ok(KvElement::Int8),
        other => Err(Exception::custom(format!("a cache of {other:?}"))),
    }
}

fn dtype(element: KvElement) -> Dtype {
    match element {
        KvElement::Float32 => Dtype::Float32,
        KvElement::Float16 => Dtype::Float16,
        KvElement::Bfloat16 => Dtype::Bfloat16,
        KvElement::Int8 => Dtype::Int8,
    }
}

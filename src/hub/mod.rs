//! Model files: local folders, the Hugging Face cache, conversion from GGUF.

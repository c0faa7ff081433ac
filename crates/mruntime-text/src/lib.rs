//! Tokenizer, chat template and streaming detokeniser for mruntime

//! Hugging Face Qwen2 directory to .mrt file

fn main() {}

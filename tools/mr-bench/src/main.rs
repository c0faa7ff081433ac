//! Speed, roofline, logits and perplexity

fn main() {}

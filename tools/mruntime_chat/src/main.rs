//! Chat with a model in a terminal

fn main() {}

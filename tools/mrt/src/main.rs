//! Looks at and verifies .mrt files

fn main() {}

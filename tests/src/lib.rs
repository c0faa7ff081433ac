//! What crosses crates

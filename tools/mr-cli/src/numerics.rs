//! `--numerics`: what the forward pass may trade for speed.

use clap::{Args, ValueEnum};
use mruntime::{Isa, Numerics};

use crate::Result;

/// The choice of the numerics.
#[derive(Args)]
pub struct NumericsArg {
    /// Exact: the same bits on every machine and for every batch. Fast: products on 16-bit units, where there are any
    #[arg(long, value_enum, default_value_t)]
    numerics: Choice,
}

#[derive(Clone, Copy, Default, ValueEnum)]
enum Choice {
    #[default]
    Exact,
    Fast,
}

impl NumericsArg {
    /// What was chosen, on `isa`.
    ///
    /// # Errors
    /// When there is no fast lane.
    pub fn get(&self, isa: Isa) -> Result<Numerics> {
        match self.numerics {
            Choice::Exact => Ok(Numerics::Exact),
            Choice::Fast => Numerics::fast(isa).ok_or_else(|| {
                format!("this machine has no fast lane for {}; leave out --numerics fast", isa.name()).into()
            }),
        }
    }
}

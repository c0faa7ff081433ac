//! Asks before it allocates: `memory_budget FILE.mrt MEGABYTES` prints what some contexts need, and takes the longest that
//! the budget allows.

#![forbid(unsafe_code)]

use std::error::Error;

use mruntime::{
    Backing, Limits, Model, OpenOptions, Pool, create_qwen2_arenas, performance_cores, qwen2_memory_sizes,
};

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [file, budget] = args.as_slice() else {
        return Err("usage: memory_budget FILE.mrt MEGABYTES".into());
    };
    let budget = budget.parse::<u64>()? * 1_000_000;
    let mut pool = Pool::new(performance_cores())?;
    let model = Model::open(file, &OpenOptions::default(), &mut pool)?;
    let limits = |context| Limits { context, batch: 256, threads: pool.threads() };
    // Mapped weights are the page cache's, and none of the process's own.
    let mapped = model.backing() == Some(Backing::Map);

    println!("context   KV cache   scratch    weights  (MB{})", if mapped { ", weights mapped" } else { "" });
    let mut fits = None;
    let trained = model.config().max_position_embeddings as usize;
    for context in (0..).map(|i| 512 << i).take_while(|&context| context <= trained) {
        let sizes = qwen2_memory_sizes(model.config(), &limits(context))?;
        let mb = |bytes: u64| bytes as f64 / 1e6;
        println!(
            "{context:7}  {:9.1} {:9.1}  {:9.1}",
            mb(sizes.kv_cache),
            mb(sizes.scratch),
            mb(sizes.weights)
        );
        let own = sizes.kv_cache + sizes.scratch + if mapped { 0 } else { sizes.weights };
        if own <= budget {
            fits = Some(context);
        }
    }
    let context = fits.ok_or("no context fits into the budget")?;
    create_qwen2_arenas(model.config(), &limits(context))?;
    println!("allocated for a context of {context}");
    Ok(())
}

//! For feature `kleidiai` on 64-bit Arm: finds an installed KleidiAI library and links it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "kleidiai")]
    if std::env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "aarch64")
        && let Err(message) = kleidiai::link()
    {
        println!("cargo::error={message}");
    }
}

#[cfg(feature = "kleidiai")]
mod kleidiai {
    use std::path::Path;

    pub fn link() -> Result<(), String> {
        println!("cargo::rerun-if-env-changed=KLEIDIAI_DIR");
        let Some(dir) = std::env::var_os("KLEIDIAI_DIR") else {
            return match pkg_config::probe_library("kleidiai") {
                Ok(_) => Ok(()), // It has told cargo.
                Err(error) => Err(format!(
                    "feature `kleidiai` needs an installed KleidiAI library: set KLEIDIAI_DIR to the folder that it \
                     was installed in; pkg-config says: {}",
                    error.to_string().replace('\n', " ")
                )),
            };
        };
        let kinds =
            [("static", "libkleidiai.a"), ("dylib", "libkleidiai.so"), ("dylib", "libkleidiai.dylib")];
        for folder in ["lib", "lib64", ""] {
            let folder = Path::new(&dir).join(folder);
            if let Some((kind, _)) = kinds.iter().find(|(_, file)| folder.join(file).exists()) {
                println!("cargo::rustc-link-search=native={}", folder.display());
                println!("cargo::rustc-link-lib={kind}=kleidiai");
                return Ok(());
            }
        }
        let dir = Path::new(&dir).display();
        Err(format!(
            "KLEIDIAI_DIR: no libkleidiai.a, .so or .dylib in {dir}, nor in its folders lib and lib64"
        ))
    }
}

//! The instruction set that an operation runs on, and the one place where generic code meets it.

#[cfg(target_arch = "aarch64")]
use std::arch::is_aarch64_feature_detected;
#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::__cpuid;
#[cfg(target_arch = "x86_64")]
use std::sync::LazyLock;

/// An instruction set that this machine has.
///
/// A value is proof of detection: it comes only from [`Isa::detect`], [`Isa::supported`] and
/// [`Isa::PORTABLE`], or in a kernel from the one that it was called with, so an operation that is handed one may run the
/// instructions it stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Isa(pub(crate) Kind);

/// An instruction set, and the processors that its tiles and streams are made for: Intel's, or AMD's and all others. Both give the
/// same bits everywhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx2Intel,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx512Intel,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "aarch64")]
    NeonFhm,
}

impl Isa {
    /// Plain Rust, the reference that every other path equals bit for bit.
    pub const PORTABLE: Isa = Isa(Kind::Portable);

    /// The fastest instruction set of this machine.
    pub fn detect() -> Isa {
        Isa::supported().last().unwrap_or(Isa::PORTABLE)
    }

    /// Every instruction set that this machine has, slowest first.
    pub fn supported() -> impl Iterator<Item = Isa> {
        Isa::variants().filter(|isa| isa.0.is_of_this_maker())
    }

    /// The same, also as they are made for other processors. Tests go through all.
    pub(crate) fn variants() -> impl Iterator<Item = Isa> {
        const ALL: &[Kind] = &[
            Kind::Portable,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2Intel,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512Intel,
            #[cfg(target_arch = "aarch64")]
            Kind::Neon,
            #[cfg(target_arch = "aarch64")]
            Kind::NeonFhm,
        ];
        ALL.iter().copied().filter(|kind| kind.is_detected()).map(Isa)
    }

    /// The supported instruction set of that [`name`](Isa::name).
    pub fn by_name(name: &str) -> Option<Isa> {
        Isa::supported().find(|isa| isa.name() == name)
    }

    /// `portable`, `avx2`, `avx512`, `neon` or `neon-fhm`.
    pub fn name(self) -> &'static str {
        match self.0 {
            Kind::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::Avx2Intel => "avx2",
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 | Kind::Avx512Intel => "avx512",
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Kind::NeonFhm => "neon-fhm",
        }
    }
}

impl Kind {
    fn is_detected(self) -> bool {
        match self {
            Kind::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::Avx2Intel => {
                is_x86_feature_detected!("avx2")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Kind::Avx512 | Kind::Avx512Intel => {
                is_x86_feature_detected!("avx512f") && Kind::Avx2.is_detected()
            }
            #[cfg(target_arch = "aarch64")]
            Kind::Neon => is_aarch64_feature_detected!("neon"),
            #[cfg(target_arch = "aarch64")]
            Kind::NeonFhm => is_aarch64_feature_detected!("fhm") && Kind::Neon.is_detected(),
        }
    }

    /// Whether it is the variant for this machine's processor.
    fn is_of_this_maker(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2 | Kind::Avx512 => !*IS_INTEL,
            #[cfg(target_arch = "x86_64")]
            Kind::Avx2Intel | Kind::Avx512Intel => *IS_INTEL,
            _ => true,
        }
    }
}

/// Asked once: where the processor is virtual, each CPUID takes microseconds.
#[cfg(target_arch = "x86_64")]
static IS_INTEL: LazyLock<bool> = LazyLock::new(|| {
    let maker = __cpuid(0);
    let name = [maker.ebx, maker.edx, maker.ecx].map(u32::to_le_bytes);
    name.as_flattened() == b"GenuineIntel"
});

/// Calls `$function::<L>($arg, ...)`, an `#[inline(always)] unsafe fn` generic over [`crate::lanes::Lanes`], with
/// the vector type of `$isa`, from a function that is compiled for that instruction set.
macro_rules! dispatch {
    ($isa:expr, $function:ident $signature:tt $(-> $ret:ty)?) => {
        match $isa.0 {
            $crate::isa::Kind::Portable => {
                $crate::isa::call!($function $signature $(-> $ret)?, on_portable, $crate::portable::Lanes16)
            }
            #[cfg(target_arch = "x86_64")]
            $crate::isa::Kind::Avx2 => {
                $crate::isa::call!($function $signature $(-> $ret)?, on_avx2, $crate::avx2::Lanes16<false>, "avx2,fma,f16c")
            }
            #[cfg(target_arch = "x86_64")]
            $crate::isa::Kind::Avx2Intel => {
                $crate::isa::call!($function $signature $(-> $ret)?, on_avx2_intel, $crate::avx2::Lanes16<true>, "avx2,fma,f16c")
            }
            #[cfg(target_arch = "x86_64")]
            $crate::isa::Kind::Avx512 => {
                $crate::isa::call!(
                    $function $signature $(-> $ret)?, on_avx512, $crate::avx512::Lanes16<false>, "avx512f,avx2,fma,f16c"
                )
            }
            #[cfg(target_arch = "x86_64")]
            $crate::isa::Kind::Avx512Intel => {
                $crate::isa::call!(
                    $function $signature $(-> $ret)?, on_avx512_intel, $crate::avx512::Lanes16<true>, "avx512f,avx2,fma,f16c"
                )
            }
            #[cfg(target_arch = "aarch64")]
            $crate::isa::Kind::Neon => {
                $crate::isa::call!($function $signature $(-> $ret)?, on_neon, $crate::neon::Lanes16<false>, "neon")
            }
            #[cfg(target_arch = "aarch64")]
            $crate::isa::Kind::NeonFhm => {
                $crate::isa::call!($function $signature $(-> $ret)?, on_neon_fhm, $crate::neon::Lanes16<true>, "neon,fhm")
            }
        }
    };
}
pub(crate) use dispatch;

/// One arm of [`dispatch!`]: calls `$function::<$lanes>` from a function `$name` that has the features of that vector type.
macro_rules! call {
    (
        $function:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?, $name:ident, $lanes:ty $(, $features:literal)?
    ) => {{
        $(#[target_feature(enable = $features)])?
        unsafe fn $name($($arg: $ty),*) $(-> $ret)? {
            // SAFETY: this function has the features of the vector type; the rest is the caller's promise.
            unsafe { $function::<$lanes>($($arg),*) }
        }
        // SAFETY: an `Isa` proves that its features were detected; the function's own demands are met by the caller of
        // `dispatch!`.
        unsafe { $name($($arg),*) }
    }};
}
pub(crate) use call;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_variant_of_each_instruction_set_is_for_this_processor() {
        let mut names: Vec<_> = Isa::variants().map(Isa::name).collect();
        names.dedup();
        assert_eq!(Isa::supported().map(Isa::name).collect::<Vec<_>>(), names);
    }
}

#[cfg(all(test, target_arch = "aarch64", target_os = "linux"))]
mod aarch64_tests {
    use super::*;

    /// The kernel's word for what the processor can do: entry AT_HWCAP of the auxiliary vector.
    fn hwcap() -> u64 {
        const AT_HWCAP: u64 = 16;
        let auxv = std::fs::read("/proc/self/auxv").unwrap();
        let words: Vec<u64> = auxv.as_chunks().0.iter().map(|bytes| u64::from_ne_bytes(*bytes)).collect();
        words.as_chunks().0.iter().find_map(|&[key, value]| (key == AT_HWCAP).then_some(value)).unwrap()
    }

    #[test]
    fn what_the_processor_lacks_is_not_supported() {
        const ASIMD: u64 = 1 << 1;
        const ASIMDFHM: u64 = 1 << 23;
        let names: Vec<_> = Isa::supported().map(Isa::name).collect();
        let want = [(0, "portable"), (ASIMD, "neon"), (ASIMDFHM, "neon-fhm")];
        let want: Vec<_> =
            want.iter().filter(|(bit, _)| hwcap() & bit == *bit).map(|(_, name)| *name).collect();
        assert_eq!(names, want);
    }

    /// By Arm's manuals of the processors. qemu takes the one that it plays from the same variable; on a real one, or
    /// another, the test above is all.
    #[test]
    fn these_processors_have_what_their_manuals_say() {
        let best = match std::env::var("QEMU_CPU").as_deref() {
            Ok("cortex-a53" | "cortex-a72" | "cortex-a76" | "neoverse-n1") => "neon",
            Ok("max") => "neon-fhm",
            _ => return,
        };
        assert_eq!(Isa::detect().name(), best);
    }
}

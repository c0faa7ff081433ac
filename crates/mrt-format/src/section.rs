//! The sections that have a binary form: tensor table, conversion report and generation defaults.

use zerocopy::little_endian::{F32, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::config::Qwen2Config;
use crate::digest::Digest;
use crate::error::FormatError;
use crate::layout::{TensorEntry, qwen2_weights_layout};
use crate::pack::{Counts, SourceDtype};
use crate::source::{qwen2_source_count, qwen2_source_tensors};
use crate::tokenizer::TOKENIZER;

/// Name of the section that lists the tensors of the arena; every file has it.
pub const TENSOR_TABLE: &str = "tensor_table";
/// Name of the section that says what conversion did to each source tensor.
pub const CONVERSION_REPORT: &str = "conversion_report";
/// Name of the section with [`GenerationDefaults`].
pub const GENERATION: &str = "generation";
/// Name of the section with the chat template, a Jinja text in UTF-8.
pub const CHAT_TEMPLATE: &str = "chat_template";
/// Name of the section that says where the model comes from, a text in UTF-8.
pub const ORIGIN: &str = "origin";
/// Name of the section with the names of special tokens: for each its name and its text, both in UTF-8 and ended by a
/// zero byte.
pub const TOKEN_NAMES: &str = "token_names";

/// The sections that format version 1.0 defines. Others may be present, but none that a reader must know.
pub(crate) const KNOWN_SECTIONS: [&str; 11] = [
    TENSOR_TABLE,
    CONVERSION_REPORT,
    GENERATION,
    CHAT_TEMPLATE,
    ORIGIN,
    TOKENIZER,
    TOKEN_NAMES,
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
];

/// The length that section `name` must have, if the config (or the format) fixes it.
pub(crate) fn fixed_section_bytes(cfg: &Qwen2Config, name: &str) -> Option<u64> {
    match name {
        TENSOR_TABLE => Some((tensor_count(cfg) * size_of::<RawTensor>()) as u64),
        CONVERSION_REPORT => Some((qwen2_source_count(cfg) * size_of::<RawReport>()) as u64),
        GENERATION => Some(size_of::<RawGeneration>() as u64),
        _ => None,
    }
}

fn tensor_count(cfg: &Qwen2Config) -> usize {
    qwen2_weights_layout(cfg).tensors(cfg).count()
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawTensor {
    name: [u8; 64],
    kind: U32,
    k: U32,
    n: U32,
    reserved: U32,
    offset: U64,
    bytes: U64,
}

/// The tensor table of a config: one record of 96 bytes per tensor of the arena.
pub fn tensor_table(cfg: &Qwen2Config) -> Vec<u8> {
    let record = |tensor: TensorEntry| {
        let mut name = [0; 64];
        let text = tensor.name();
        name[..text.len()].copy_from_slice(text.as_bytes());
        RawTensor {
            name,
            kind: (tensor.kind as u32).into(),
            k: tensor.k.into(),
            n: tensor.n.into(),
            reserved: 0.into(),
            offset: tensor.span.offset.into(),
            bytes: tensor.span.bytes.into(),
        }
    };
    qwen2_weights_layout(cfg).tensors(cfg).map(record).collect::<Vec<_>>().as_bytes().to_vec()
}

/// Compares a tensor table with that of the config.
pub(crate) fn check_tensor_table(cfg: &Qwen2Config, bytes: &[u8]) -> Result<(), FormatError> {
    let expected = tensor_table(cfg);
    if bytes == expected {
        return Ok(());
    }
    let mut records = bytes.chunks(size_of::<RawTensor>()).zip(expected.chunks(size_of::<RawTensor>()));
    let tensor = match records.position(|(found, expected)| found != expected) {
        Some(i) => qwen2_weights_layout(cfg).tensors(cfg).nth(i).expect("as many as records").name(),
        None => "its end".to_owned(),
    };
    Err(FormatError::TensorTableMismatch { tensor })
}

/// What conversion did to one source tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReportEntry {
    /// Element type of the source.
    pub dtype: SourceDtype,
    /// What became of its elements.
    pub counts: Counts,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawReport {
    dtype: U32,
    reserved: U32,
    exact: U64,
    rounded: U64,
    flushed: U64,
}

/// The conversion report as bytes: one record of 32 bytes per source tensor, in the order of
/// [`qwen2_source_tensors`].
pub fn report_to_bytes(report: &[ReportEntry]) -> Vec<u8> {
    let record = |entry: &ReportEntry| RawReport {
        dtype: (entry.dtype as u32).into(),
        reserved: 0.into(),
        exact: entry.counts.exact.into(),
        rounded: entry.counts.rounded.into(),
        flushed: entry.counts.flushed.into(),
    };
    report.iter().map(record).collect::<Vec<_>>().as_bytes().to_vec()
}

/// The file beside unpacked weights that holds the report of their conversion, by the name of the weights
/// ([`arena_digest`](crate::arena_digest)): that of other weights is not taken for it.
pub fn report_file_name(arena: &Digest) -> String {
    format!("{CONVERSION_REPORT}-{arena}")
}

/// Reads a conversion report.
///
/// # Errors
/// [`FormatError::BadSectionBytes`] if the length is wrong, [`FormatError::BadReport`] if a record has an
/// unknown element type or does not account for every element of its tensor.
pub fn report_from_bytes(cfg: &Qwen2Config, bytes: &[u8]) -> Result<Vec<ReportEntry>, FormatError> {
    let records = records::<RawReport>(cfg, CONVERSION_REPORT, bytes)?;
    let entry = |(raw, tensor): (&RawReport, crate::SourceTensor)| {
        let bad = |field, value| FormatError::BadReport { tensor: tensor.name.clone(), field, value };
        let dtype = match raw.dtype.get() {
            1 => SourceDtype::Bf16,
            2 => SourceDtype::F16,
            3 => SourceDtype::F32,
            other => return Err(bad("dtype", other.into())),
        };
        if raw.reserved != 0 {
            return Err(bad("reserved", raw.reserved.get().into()));
        }
        let counts =
            Counts { exact: raw.exact.get(), rounded: raw.rounded.get(), flushed: raw.flushed.get() };
        let total = u128::from(counts.exact) + u128::from(counts.rounded) + u128::from(counts.flushed);
        if total != u128::from(tensor.elements()) {
            return Err(bad("the number of elements", u64::try_from(total).unwrap_or(u64::MAX)));
        }
        Ok(ReportEntry { dtype, counts })
    };
    records.iter().zip(qwen2_source_tensors(cfg)).map(entry).collect()
}

/// The bytes of section `name` as records, if their number is right.
fn records<'a, T: FromBytes + Immutable + KnownLayout + Unaligned>(
    cfg: &Qwen2Config,
    name: &str,
    bytes: &'a [u8],
) -> Result<&'a [T], FormatError> {
    let found = bytes.len() as u64;
    match fixed_section_bytes(cfg, name) {
        Some(expected) if found != expected => {
            Err(FormatError::BadSectionBytes { name: name.to_owned(), found, expected })
        }
        _ => Ok(<[T]>::ref_from_bytes(bytes).expect("a whole number of unaligned records")),
    }
}

/// Most stop tokens of a file.
pub const MAX_STOP_TOKENS: usize = 16;

/// How the model's makers want text to be generated.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationDefaults {
    /// Whether to sample; if not, the likeliest token is taken.
    pub do_sample: bool,
    /// Divisor of the logits, from 0 (greedy) to 100.
    pub temperature: f32,
    /// Nucleus sampling: the likeliest tokens that reach this probability together; above 0, 1 for all.
    pub top_p: f32,
    /// Tokens less likely than this share of the likeliest one's probability are left out, from 0 (none) to
    /// 1.
    pub min_p: f32,
    /// Divisor of positive, multiplier of negative logits of tokens that occurred, above 0 to 100; 1 for
    /// none.
    pub repetition_penalty: f32,
    /// The number of likeliest tokens to choose from; 0 for all.
    pub top_k: u32,
    /// The token that begins a text, if the model has one.
    pub bos_token: Option<u32>,
    /// The tokens that end an answer, at most 16.
    pub stop_tokens: Vec<u32>,
}

impl Default for GenerationDefaults {
    /// Greedy, and no stop tokens; if sampling is switched on, from the model's own distribution.
    fn default() -> GenerationDefaults {
        GenerationDefaults {
            do_sample: false,
            temperature: 1.0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            top_k: 0,
            bos_token: None,
            stop_tokens: Vec::new(),
        }
    }
}

const FLAG_DO_SAMPLE: u32 = 1;
const FLAG_BOS_TOKEN: u32 = 2;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawGeneration {
    flags: U32,
    bos_token: U32,
    temperature: F32,
    top_p: F32,
    min_p: F32,
    repetition_penalty: F32,
    top_k: U32,
    stop_count: U32,
    stop_tokens: [U32; MAX_STOP_TOKENS],
    reserved: [u8; 32],
}

impl GenerationDefaults {
    /// The section's 128 bytes.
    ///
    /// # Errors
    /// [`FormatError::BadGeneration`] if a field is outside its range, so that every section written can be
    /// read.
    pub fn to_bytes(&self, cfg: &Qwen2Config) -> Result<Vec<u8>, FormatError> {
        let mut stop_tokens = [U32::ZERO; MAX_STOP_TOKENS];
        for (raw, &token) in stop_tokens.iter_mut().zip(&self.stop_tokens) {
            *raw = token.into();
        }
        let flag = |set, bit| if set { bit } else { 0 };
        let raw = RawGeneration {
            flags: (flag(self.do_sample, FLAG_DO_SAMPLE) | flag(self.bos_token.is_some(), FLAG_BOS_TOKEN))
                .into(),
            bos_token: self.bos_token.unwrap_or(0).into(),
            temperature: self.temperature.into(),
            top_p: self.top_p.into(),
            min_p: self.min_p.into(),
            repetition_penalty: self.repetition_penalty.into(),
            top_k: self.top_k.into(),
            stop_count: (self.stop_tokens.len() as u32).into(),
            stop_tokens,
            reserved: [0; 32],
        };
        let bytes = raw.as_bytes().to_vec();
        GenerationDefaults::from_bytes(cfg, &bytes)?;
        Ok(bytes)
    }

    /// Reads the section.
    ///
    /// # Errors
    /// [`FormatError::BadSectionBytes`] if there are not 128 bytes, [`FormatError::BadGeneration`] if a field
    /// is outside its range or what must be zero is not.
    pub fn from_bytes(cfg: &Qwen2Config, bytes: &[u8]) -> Result<GenerationDefaults, FormatError> {
        let raw = &records::<RawGeneration>(cfg, GENERATION, bytes)?[0];
        let bad = |field, value: String, expected: &str| {
            Err(FormatError::BadGeneration { field, value, expected: expected.to_owned() })
        };
        let flags = raw.flags.get();
        if flags & !(FLAG_DO_SAMPLE | FLAG_BOS_TOKEN) != 0 {
            return bad("flags", flags.to_string(), "from 0 to 3");
        }
        let (temperature, top_p) = (raw.temperature.get(), raw.top_p.get());
        let (min_p, repetition_penalty) = (raw.min_p.get(), raw.repetition_penalty.get());
        if !(0.0..=100.0).contains(&temperature) {
            return bad("temperature", temperature.to_string(), "from 0 to 100");
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            return bad("top_p", top_p.to_string(), "above 0, at most 1");
        }
        if !(0.0..=1.0).contains(&min_p) {
            return bad("min_p", min_p.to_string(), "from 0 to 1");
        }
        if !(repetition_penalty > 0.0 && repetition_penalty <= 100.0) {
            return bad("repetition_penalty", repetition_penalty.to_string(), "above 0, at most 100");
        }
        let stop_count = raw.stop_count.get() as usize;
        if stop_count > MAX_STOP_TOKENS {
            return bad("stop_count", stop_count.to_string(), "from 0 to 16");
        }
        let (stop_tokens, unused) = raw.stop_tokens.split_at(stop_count);
        let bos_token = raw.bos_token.get();
        for (field, token) in
            [("bos_token", bos_token)].into_iter().chain(stop_tokens.iter().map(|t| ("stop_tokens", t.get())))
        {
            if token >= cfg.vocab_size {
                return bad(field, token.to_string(), &format!("below vocab_size = {}", cfg.vocab_size));
            }
        }
        let has_bos = flags & FLAG_BOS_TOKEN != 0;
        if !has_bos && bos_token != 0 {
            return bad("bos_token", bos_token.to_string(), "0, for the flags say that there is none");
        }
        if unused.iter().any(|token| token.get() != 0) || raw.reserved != [0; 32] {
            return bad("reserved", "not zero".to_owned(), "zeros");
        }
        Ok(GenerationDefaults {
            do_sample: flags & FLAG_DO_SAMPLE != 0,
            temperature,
            top_p,
            min_p,
            repetition_penalty,
            top_k: raw.top_k.get(),
            bos_token: has_bos.then_some(bos_token),
            stop_tokens: stop_tokens.iter().map(|token| token.get()).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::test_model::{QWEN2_0_5B, TINY};

    #[test]
    fn tensor_table_records() {
        let table = tensor_table(&TINY);
        assert_eq!(table.len(), 96 * 15);
        assert_eq!(fixed_section_bytes(&TINY, TENSOR_TABLE), Some(96 * 15));
        let record = &table[96 * 5..96 * 6];
        assert_eq!(record[..65], *b"layers.0.gate_up\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x03");
        assert_eq!(record[64..80], [3, 0, 0, 0, 40, 0, 0, 0, 72, 0, 0, 0, 0, 0, 0, 0]);
        let span = qwen2_weights_layout(&TINY).layer(0).gate_up;
        assert_eq!(record[80..88], span.offset.to_le_bytes());
        assert_eq!(record[88..96], span.bytes.to_le_bytes());
    }

    #[test]
    fn another_tensor_table_is_refused() {
        let table = tensor_table(&TINY);
        assert_eq!(check_tensor_table(&TINY, &table), Ok(()));
        for byte in 0..table.len() {
            let mut table = table.clone();
            table[byte] ^= 1;
            let tensor = qwen2_weights_layout(&TINY).tensors(&TINY).nth(byte / 96).unwrap().name();
            assert_eq!(check_tensor_table(&TINY, &table), Err(FormatError::TensorTableMismatch { tensor }));
        }
        for length in [0, 95, 96 * 14, 96 * 15 - 1] {
            assert!(check_tensor_table(&TINY, &table[..length]).is_err());
        }
    }

    fn report() -> Vec<ReportEntry> {
        let entry = |tensor: crate::SourceTensor| ReportEntry {
            dtype: SourceDtype::F32,
            counts: Counts { exact: tensor.elements() - 3, rounded: 2, flushed: 1 },
        };
        qwen2_source_tensors(&TINY).into_iter().map(entry).collect()
    }

    #[test]
    fn report_round_trip() {
        let bytes = report_to_bytes(&report());
        assert_eq!(bytes.len(), 32 * 27);
        assert_eq!(bytes[..8], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(report_from_bytes(&TINY, &bytes), Ok(report()));
    }

    #[test]
    fn bad_reports_are_refused() {
        let bad = |offset: usize, new: &[u8]| {
            let mut bytes = report_to_bytes(&report());
            bytes[offset..][..new.len()].copy_from_slice(new);
            report_from_bytes(&TINY, &bytes).unwrap_err()
        };
        let tensor = || "model.layers.0.input_layernorm.weight".to_owned();
        assert_eq!(bad(32, &[4]), FormatError::BadReport { tensor: tensor(), field: "dtype", value: 4 });
        assert_eq!(bad(36, &[1]), FormatError::BadReport { tensor: tensor(), field: "reserved", value: 1 });
        let field = "the number of elements";
        assert_eq!(bad(40, &[36]), FormatError::BadReport { tensor: tensor(), field, value: 39 });
        let wrapped = bad(40, &[0xff; 24]);
        assert_eq!(wrapped, FormatError::BadReport { tensor: tensor(), field, value: u64::MAX });
        let short =
            FormatError::BadSectionBytes { name: CONVERSION_REPORT.to_owned(), found: 863, expected: 864 };
        assert_eq!(report_from_bytes(&TINY, &report_to_bytes(&report())[1..]), Err(short));
    }

    fn generation() -> GenerationDefaults {
        GenerationDefaults {
            do_sample: true,
            temperature: 0.7,
            top_p: 0.8,
            min_p: 0.05,
            repetition_penalty: 1.1,
            top_k: 20,
            bos_token: Some(151643),
            stop_tokens: vec![151645, 151643],
        }
    }

    #[test]
    fn generation_round_trip() {
        let sixteen =
            GenerationDefaults { stop_tokens: (0..16).collect(), bos_token: Some(0), ..generation() };
        for defaults in [generation(), GenerationDefaults::default(), sixteen] {
            let bytes = defaults.to_bytes(&QWEN2_0_5B).unwrap();
            assert_eq!(bytes.len(), 128);
            assert_eq!(GenerationDefaults::from_bytes(&QWEN2_0_5B, &bytes), Ok(defaults));
        }
    }

    #[test]
    fn bad_generation_defaults_are_refused() {
        type Change = fn(&mut GenerationDefaults);
        let cases: [(&str, Change); 12] = [
            ("temperature", |g| g.temperature = -1.0),
            ("temperature", |g| g.temperature = f32::NAN),
            ("temperature", |g| g.temperature = f32::INFINITY),
            ("top_p", |g| g.top_p = 0.0),
            ("top_p", |g| g.top_p = 1.5),
            ("min_p", |g| g.min_p = -0.1),
            ("min_p", |g| g.min_p = f32::NAN),
            ("repetition_penalty", |g| g.repetition_penalty = 0.0),
            ("repetition_penalty", |g| g.repetition_penalty = 101.0),
            ("stop_count", |g| g.stop_tokens = vec![1; 17]),
            ("stop_tokens", |g| g.stop_tokens = vec![1, 151936]),
            ("bos_token", |g| g.bos_token = Some(151936)),
        ];
        for (expected, change) in cases {
            let mut defaults = generation();
            change(&mut defaults);
            let error = defaults.to_bytes(&QWEN2_0_5B);
            assert!(
                matches!(error, Err(FormatError::BadGeneration { field, .. }) if field == expected),
                "{expected}"
            );
        }
        let bytes = generation().to_bytes(&QWEN2_0_5B).unwrap();
        // An unknown flag, a token without its flag, a token after the last, the reserved end.
        for (expected, offset, byte) in
            [("flags", 0, 7), ("bos_token", 0, 1), ("reserved", 40, 1), ("reserved", 127, 1)]
        {
            let mut bytes = bytes.clone();
            bytes[offset] = byte;
            let error = GenerationDefaults::from_bytes(&QWEN2_0_5B, &bytes);
            assert!(
                matches!(error, Err(FormatError::BadGeneration { field, .. }) if field == expected),
                "{expected}"
            );
        }
        let error = GenerationDefaults::from_bytes(&QWEN2_0_5B, &bytes[..127]);
        assert!(matches!(error, Err(FormatError::BadSectionBytes { found: 127, expected: 128, .. })));
    }

    proptest! {
        #[test]
        fn arbitrary_sections_do_not_panic(bytes: Vec<u8>) {
            let _ = report_from_bytes(&TINY, &bytes);
            let _ = GenerationDefaults::from_bytes(&TINY, &bytes);
            let _ = check_tensor_table(&TINY, &bytes);
        }

        #[test]
        fn arbitrary_generation_is_refused_or_read_exactly(
            bytes in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 128),
        ) {
            if let Ok(defaults) = GenerationDefaults::from_bytes(&QWEN2_0_5B, &bytes) {
                prop_assert_eq!(defaults.to_bytes(&QWEN2_0_5B), Ok(bytes));
            }
        }

        #[test]
        fn arbitrary_reports_do_not_panic(bytes in prop::collection::vec(any::<u8>(), 32 * 27)) {
            let _ = report_from_bytes(&TINY, &bytes);
        }
    }
}

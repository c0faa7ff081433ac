/*
 * mruntime: runs Qwen2 models from one .mrt file.
 *
 * Rules for all functions:
 *
 * - A function that can fail returns a status; MRUNTIME_OK is 0. What went wrong stands in mruntime_last_error().
 *   Output parameters are then as they were, if nothing else is said.
 * - A pointer may be NULL only where this is said; a null pointer elsewhere gives MRUNTIME_INVALID_ARGUMENT. Texts
 *   are UTF-8; those without a length end with a zero byte.
 * - Structures begin with their size: set it to sizeof, and all that is not used to 0. So structures can grow. Only
 *   mruntime_message has no size, and is fixed.
 * - A buffer has a capacity; the length that is needed is returned whether the buffer is large enough or not. A null
 *   buffer asks for the length only.
 * - Threads: a model may be used by any number of threads at the same time. A session is for one thread at a time: a
 *   second call meanwhile, also from a callback, gives MRUNTIME_BUSY. Only mruntime_session_cancel may be called while
 *   another call runs. Nobody may use a handle while or after it is closed.
 * - The library keeps no state of its own but the last error of each thread.
 */

#ifndef MRUNTIME_H
#define MRUNTIME_H

#include <stddef.h>
#include <stdint.h>

/* Define MRUNTIME_NO_TEXT if the library was built without its feature "text". */
#ifndef MRUNTIME_NO_TEXT
#define MRUNTIME_TEXT
#endif

// Version of this interface. It grows when a program that was compiled for an earlier one would no longer work.
#define MRUNTIME_ABI_VERSION 1

// How a call ended.
typedef enum mruntime_status {
    // It did what it should.
    MRUNTIME_OK = 0,
    // An argument is a null pointer, not UTF-8, out of its range, or a structure of a wrong size.
    MRUNTIME_INVALID_ARGUMENT = 1,
    // The system could not read or write a file.
    MRUNTIME_IO = 2,
    // A file is of another kind, version or model than it should be, or a session file is damaged.
    MRUNTIME_FORMAT = 3,
    // A model file is damaged or truncated: get it again.
    MRUNTIME_DAMAGED = 4,
    // Memory or a thread cannot be had.
    MRUNTIME_MEMORY = 5,
    // The tokens do not fit into the context.
    MRUNTIME_CONTEXT_FULL = 6,
    // mruntime_session_cancel was called.
    MRUNTIME_CANCELLED = 7,
    // Another call is using the session.
    MRUNTIME_BUSY = 8,
    // The buffer is too small; the length that is needed was returned.
    MRUNTIME_BUFFER_TOO_SMALL = 9,
    // The model has nothing of the kind, such as a section or a chat template.
    MRUNTIME_NOT_FOUND = 10,
    // The tokenizer or the chat template failed on this text.
    MRUNTIME_TEXT_FAILED = 11,
    // A mistake in the library.
    MRUNTIME_INTERNAL = 12,
} mruntime_status;

#if defined(MRUNTIME_TEXT)
// What becomes of special tokens, such as <|im_end|>, that stand in a text.
typedef enum mruntime_special {
#if defined(MRUNTIME_TEXT)
    // They are text like any other: for text that nobody vouches for.
    MRUNTIME_SPECIAL_AS_TEXT = 0,
#endif
#if defined(MRUNTIME_TEXT)
    // They become their token: for text that a chat template wrote.
    MRUNTIME_SPECIAL_PARSE = 1,
#endif
} mruntime_special;
#endif

// Why generation ended.
typedef enum mruntime_stop {
    // As many tokens as allowed were generated.
    MRUNTIME_STOP_MAX_TOKENS = 0,
    // The model ended its answer.
    MRUNTIME_STOP_TOKEN = 1,
    // The context has no room for another token.
    MRUNTIME_STOP_CONTEXT_FULL = 2,
    // The callback said so.
    MRUNTIME_STOP_CALLBACK = 3,
    // mruntime_session_cancel was called.
    MRUNTIME_STOP_CANCELLED = 4,
} mruntime_stop;

// An open model.
typedef struct mruntime_model mruntime_model;

// A text, with its KV cache.
typedef struct mruntime_session mruntime_session;

// How a model is opened. All zeros, or a null pointer, are the defaults.
typedef struct mruntime_open_options {
    // sizeof(mruntime_open_options)
    size_t size;
    // The root digest that the file must have, 32 bytes; NULL for any.
    const uint8_t *expected_root;
    // Threads of the pool that the model's sessions share; 0 for one on each fast physical core.
    uint32_t threads;
    // 0: the weights are mapped, and stay in the page cache. Nobody may truncate the file or write to it while it is
    // open; replacing it by renaming another one over it is fine. 1: they are read into memory of the process's own.
    uint32_t read;
    // 0: header, directory and tables are checked, sections when they are used. 1: every byte is.
    uint32_t verify;
    // When mapped weights are brought into memory. 0: by their first use; 1: by a thread, meanwhile; 2: at opening.
    uint32_t prefault;
    // 1: the weights are locked in memory, or opening fails. 0: they are not.
    uint32_t lock;
    // 0
    uint32_t reserved;
} mruntime_open_options;

// What a model is.
typedef struct mruntime_info {
    // sizeof(mruntime_info)
    size_t size;
    // Bytes of the file.
    uint64_t file_bytes;
    // Bytes of the weights.
    uint64_t weight_bytes;
    // The root digest (SHA-256), which names the content of the whole file.
    uint8_t root[32];
    // Token ids are below this.
    uint32_t vocab_size;
    // The longest context that the model was trained for.
    uint32_t max_context;
    // Layers.
    uint32_t layers;
    // Width of the residual stream.
    uint32_t hidden_size;
    // Width of the MLP.
    uint32_t intermediate_size;
    // Query heads of a layer.
    uint32_t heads;
    // Key and value heads of a layer.
    uint32_t kv_heads;
    // Width of a head.
    uint32_t head_dim;
    // 1 if the weights are mapped, 0 if they were read or given.
    uint32_t mapped;
    // Threads of the pool that the model's sessions share.
    uint32_t threads;
    // What numerics 1 of a session means on this machine: 0 the same as 0, for there is nothing faster; otherwise the
    // number of a fast lane: 1 BF16 products, 2 FP16, 3 FP16 with FMLAL for one row, 4 KleidiAI's in FP16, 5 BF16
    // products of AMX.
    uint32_t fast_numerics;
    // 0
    uint32_t reserved;
} mruntime_info;

// How tokens are chosen. All zeros: the most probable one, always.
typedef struct mruntime_sampling {
    // sizeof(mruntime_sampling)
    size_t size;
    // Where the random numbers start: the same seed, the same choices.
    uint64_t seed;
    // Divides the logits; 0 chooses the largest.
    float temperature;
    // Only so many largest logits; 0 for all.
    uint32_t top_k;
    // Only the most probable tokens whose probabilities sum to at least this; 0 or 1 for all.
    float top_p;
    // Only tokens at least this probable relative to the most probable one; 0 for all.
    float min_p;
    // Positive logits of tokens that occurred are divided by this, negative ones multiplied; 0 or 1 for none.
    float repetition_penalty;
    // 0
    uint32_t reserved;
} mruntime_sampling;

// A session's memory and threads. All zeros, or a null pointer, are the defaults.
typedef struct mruntime_session_options {
    // sizeof(mruntime_session_options)
    size_t size;
    // The most tokens of a text, prompt and answers together, but for a last one that nothing follows; 0 for 4096, or what
    // the model was trained for.
    uint64_t context;
    // Tokens of a prefill step; 0 for 512.
    uint32_t batch;
    // 0: the session shares the model's pool with other sessions, a prefill step or token at a time. Otherwise it has a
    // pool of its own of so many threads.
    uint32_t threads;
    // 0: the same bits on every machine, for any number of threads and any batches. 1: what this machine is faster at, at
    // the price of that; see fast_numerics of mruntime_info.
    uint32_t numerics;
    // At most so many threads of the pool work when a step has one token only, as in generation; 0 for all. Such steps are
    // bound by memory and can be fastest on fewer. The results are the same.
    uint32_t decode_threads;
} mruntime_session_options;

// Bytes that a session needs beside the weights.
typedef struct mruntime_memory {
    // sizeof(mruntime_memory)
    size_t size;
    // The weights, once for all sessions and, if they are mapped, for all processes.
    uint64_t weights;
    // Keys and values: taken from the system as the context fills.
    uint64_t kv_cache;
    // Activations and working memory of the threads.
    uint64_t scratch;
} mruntime_memory;

// Gets each new token. Returns 0 to go on; after another number it is not called again. It must return: no exception and no
// longjmp may leave it.
typedef int32_t (*mruntime_on_token)(void *user, uint32_t token);

// What mruntime_session_generate did.
typedef struct mruntime_generated {
    // sizeof(mruntime_generated)
    size_t size;
    // Tokens that were handed to the callback.
    uint64_t tokens;
    // Why it ended: an mruntime_stop.
    uint32_t stop;
    // The token that ended it, if the model did.
    uint32_t stop_token;
} mruntime_generated;

#if defined(MRUNTIME_TEXT)
// One message of a conversation. It stands in arrays, so it has no size and never grows.
typedef struct mruntime_message {
    // "system", "user" or "assistant".
    const char *role;
    // What was said.
    const char *content;
} mruntime_message;
#endif

#if defined(MRUNTIME_TEXT)
// Gets the text of an answer in pieces: whole characters, `length` bytes and a zero byte. Returns 0 to go on; after
// another number it is not called again. It must return: no exception and no longjmp may leave it.
typedef int32_t (*mruntime_on_text)(void *user, const char *utf8, size_t length);
#endif

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The interface's version of the library that is running. It must equal MRUNTIME_ABI_VERSION.
//
// Any thread.
uint32_t mruntime_abi_version(void);

// The library's version, such as "0.1.0".
//
// Any thread.
const char *mruntime_version(void);

// Opens the file at `path`. `options` may be NULL. On failure, `*model` is NULL.
//
// Any thread.
enum mruntime_status mruntime_model_open(const char *path,
                                         const struct mruntime_open_options *options,
                                         struct mruntime_model **model);

// Opens a model that is a part of an open file, for example an uncompressed asset of an Android package: `length` bytes
// from `offset`; 0 for all up to the end of the file. `descriptor` is a file descriptor, on Windows a HANDLE. It is
// duplicated, so it may be closed afterwards; its position is neither used nor changed. On failure, `*model` is NULL.
//
// Any thread.
enum mruntime_status mruntime_model_open_fd(ptrdiff_t descriptor,
                                            uint64_t offset,
                                            uint64_t length,
                                            const struct mruntime_open_options *options,
                                            struct mruntime_model **model);

// Opens a model in memory, such as one that is linked into the program. The bytes must begin at a multiple of 64, and stay
// unchanged until the model and all its sessions are closed. On failure, `*model` is NULL.
//
// Any thread.
enum mruntime_status mruntime_model_open_memory(const void *bytes,
                                                size_t length,
                                                const struct mruntime_open_options *options,
                                                struct mruntime_model **model);

// Closes a model and sets the handle to NULL; one that is NULL already is left. Sessions stay usable, and keep what they
// need of the model.
//
// Any thread, when no other one uses the handle.
void mruntime_model_close(struct mruntime_model **model);

// Tells what the model is.
//
// Any thread.
enum mruntime_status mruntime_model_info(const struct mruntime_model *model, struct mruntime_info *info);

// Checks every byte of the model against its digests; MRUNTIME_DAMAGED if there are other ones, and the last error says
// which.
//
// Any thread; it uses the model's pool.
enum mruntime_status mruntime_model_verify(const struct mruntime_model *model);

// Copies a section of the file, such as "tokenizer.json" or "LICENSE"; MRUNTIME_NOT_FOUND if there is none of that name.
//
// Any thread.
enum mruntime_status mruntime_model_section(const struct mruntime_model *model,
                                            const char *name,
                                            uint8_t *buffer,
                                            size_t capacity,
                                            size_t *length);

// Copies the tokens that end an answer, for programs that choose token by token with mruntime_session_next.
//
// Any thread.
enum mruntime_status mruntime_model_stop_tokens(const struct mruntime_model *model,
                                                uint32_t *buffer,
                                                size_t capacity,
                                                size_t *length);

// How the model's makers want tokens to be chosen. The seed is 0.
//
// Any thread.
enum mruntime_status mruntime_model_sampling(const struct mruntime_model *model, struct mruntime_sampling *sampling);

// Tells how many bytes a session with these options would need, before anything is allocated.
//
// Any thread.
enum mruntime_status mruntime_memory_sizes(const struct mruntime_model *model,
                                           const struct mruntime_session_options *options,
                                           struct mruntime_memory *memory);

// Creates a session with an empty text; it chooses the most probable tokens until it is told otherwise. `options` may be
// NULL. All memory that tokens are computed in is taken here: to feed, prefill and generate tokens allocates nothing. On
// failure, `*session` is NULL.
//
// Any thread.
enum mruntime_status mruntime_session_create(const struct mruntime_model *model,
                                             const struct mruntime_session_options *options,
                                             struct mruntime_session **session);

// Creates a second session with the same text, options and way to choose tokens (its random numbers start at the seed),
// in memory of its own: what texts have in common is computed once. On failure, `*fork` is NULL.
//
// One thread at a time.
enum mruntime_status mruntime_session_fork(const struct mruntime_session *session, struct mruntime_session **fork);

// Closes a session and sets the handle to NULL; one that is NULL already is left.
//
// Any thread, when no other one uses the handle.
void mruntime_session_close(struct mruntime_session **session);

// Makes the text empty.
//
// One thread at a time.
enum mruntime_status mruntime_session_reset(struct mruntime_session *session);

// Cuts the text to its first `length` tokens.
//
// One thread at a time.
enum mruntime_status mruntime_session_truncate(struct mruntime_session *session, size_t length);

// Copies the tokens of the text.
//
// One thread at a time.
enum mruntime_status mruntime_session_tokens(const struct mruntime_session *session,
                                             uint32_t *buffer,
                                             size_t capacity,
                                             size_t *length);

// Appends tokens to the text and computes them. If it fails or is cancelled, the text is as it was.
//
// One thread at a time.
enum mruntime_status mruntime_session_feed(struct mruntime_session *session, const uint32_t *tokens, size_t count);

// Makes `tokens` the text, such as the whole conversation so far. Of it, what the session already holds, the longest
// common prefix, is not computed again; its length is stored in `*reused`, which may be NULL. If the tokens are refused,
// the text is as it was; if it is cancelled, the text is that prefix.
//
// One thread at a time.
enum mruntime_status mruntime_session_prefill(struct mruntime_session *session,
                                              const uint32_t *tokens,
                                              size_t count,
                                              size_t *reused);

// Gives the logits that follow the text, one for each token id. They may be changed, for example to forbid tokens (by
// -INFINITY), before mruntime_session_next chooses by them. Valid until the next call with this session.
//
// One thread at a time.
enum mruntime_status mruntime_session_logits(struct mruntime_session *session, float **logits, size_t *count);

// Says how tokens are chosen from now on. The random numbers start at the seed. It allocates what choosing needs.
//
// One thread at a time.
enum mruntime_status mruntime_session_set_sampling(struct mruntime_session *session,
                                                   const struct mruntime_sampling *sampling);

// Chooses the next token and appends it to the text. Stop tokens, see mruntime_model_stop_tokens, are tokens like others
// here.
//
// One thread at a time.
enum mruntime_status mruntime_session_next(struct mruntime_session *session,
                                           uint32_t *token);

// Generates up to `max_tokens` tokens after the text and appends them to it. `on_token`, which gets `user`, may be NULL.
// A stop token ends the answer; it does not become part of the text. `generated` says what was done, and may be NULL.
//
// One thread at a time; the callback runs in it, and must not use the session.
enum mruntime_status mruntime_session_generate(struct mruntime_session *session,
                                               uint64_t max_tokens,
                                               mruntime_on_token on_token,
                                               void *user,
                                               struct mruntime_generated *generated);

// Ends the feed, prefill or generate call that is running with the session, after its current prefill step or token.
// Without one, it does nothing.
//
// Any thread, at any time before the session is closed.
enum mruntime_status mruntime_session_cancel(const struct mruntime_session *session);

// Writes the session to a file, whole or not at all.
//
// One thread at a time.
enum mruntime_status mruntime_session_save(const struct mruntime_session *session, const char *path);

// Takes over a session that was saved, with the same model and context. It goes on as that one would have, with numerics 0
// bit for bit. How tokens are chosen is not part of it. On failure, the text is as it was, or empty if the file cannot be
// read or holds what no session has.
//
// One thread at a time.
enum mruntime_status mruntime_session_load(struct mruntime_session *session,
                                           const char *path);

// What went wrong in the last call of this thread that failed: one line of UTF-8, empty if none did. It is valid until
// the next call of this thread that fails.
//
// Any thread; each has its own.
const char *mruntime_last_error(void);

#if defined(MRUNTIME_TEXT)
// Turns a text of `length` bytes into tokens. `special` is an mruntime_special.
//
// Any thread.
enum mruntime_status mruntime_tokenize(const struct mruntime_model *model,
                                       const char *utf8,
                                       size_t length,
                                       uint32_t special,
                                       uint32_t *tokens,
                                       size_t capacity,
                                       size_t *count);
#endif

#if defined(MRUNTIME_TEXT)
// Turns tokens into text, with a zero byte at its end that `*length` does not count. Bytes that are not UTF-8 become
// U+FFFD. If `skip_special` is not 0, special tokens are left out.
//
// A character may be split over several tokens. To give out a text while it grows, detokenize each new token together with
// those that were kept: if the text ends with U+FFFD (bytes EF BF BD), keep them all, otherwise give it out and keep none.
// At the end, give out what was kept.
//
// Any thread.
enum mruntime_status mruntime_detokenize(const struct mruntime_model *model,
                                         const uint32_t *tokens,
                                         size_t count,
                                         uint32_t skip_special,
                                         char *buffer,
                                         size_t capacity,
                                         size_t *length);
#endif

#if defined(MRUNTIME_TEXT)
// Writes a conversation as the model's chat template wants it, with a zero byte at its end that `*length` does not count.
// If `add_generation_prompt` is not 0, the text ends where the answer begins. Special tokens that stand in messages are
// not told from the template's own.
//
// Any thread.
enum mruntime_status mruntime_apply_chat_template(const struct mruntime_model *model,
                                                  const struct mruntime_message *messages,
                                                  size_t count,
                                                  uint32_t add_generation_prompt,
                                                  char *buffer,
                                                  size_t capacity,
                                                  size_t *length);
#endif

#if defined(MRUNTIME_TEXT)
// mruntime_session_feed for a text of `length` bytes. `special` is an mruntime_special.
//
// One thread at a time.
enum mruntime_status mruntime_session_feed_text(struct mruntime_session *session,
                                                const char *utf8,
                                                size_t length,
                                                uint32_t special);
#endif

#if defined(MRUNTIME_TEXT)
// mruntime_session_generate, with text in place of tokens. Special tokens are left out.
//
// One thread at a time; the callback runs in it, and must not use the session.
enum mruntime_status mruntime_session_generate_text(struct mruntime_session *session,
                                                    uint64_t max_tokens,
                                                    mruntime_on_text on_text,
                                                    void *user,
                                                    struct mruntime_generated *generated);
#endif

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* MRUNTIME_H */

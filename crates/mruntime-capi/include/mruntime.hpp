// mruntime for C++17: handles that close themselves, errors as exceptions, text as std::string.
#ifndef MRUNTIME_HPP
#define MRUNTIME_HPP

#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "mruntime.h"

namespace mruntime {

struct Error : std::runtime_error {
    explicit Error(mruntime_status s) : std::runtime_error(mruntime_last_error()), status(s) {}
    mruntime_status status;
};

inline void check(mruntime_status status) {
    if (status != MRUNTIME_OK) throw Error(status);
}

struct Message { std::string role, content; };
using Tokens = std::vector<std::uint32_t>;

class Model {
public:
    explicit Model(const std::string &path, const mruntime_open_options *options = nullptr) {
        mruntime_model *model;
        check(mruntime_model_open(path.c_str(), options, &model));
        handle_.reset(model);
    }
    mruntime_model *get() const { return handle_.get(); }

#ifdef MRUNTIME_TEXT
    Tokens tokenize(std::string_view text, mruntime_special special = MRUNTIME_SPECIAL_AS_TEXT) const {
        std::size_t n;
        check(mruntime_tokenize(get(), text.data(), text.size(), special, nullptr, 0, &n));
        Tokens tokens(n + 1); // never empty, so that its data is not null
        check(mruntime_tokenize(get(), text.data(), text.size(), special, tokens.data(), tokens.size(), &n));
        tokens.resize(n);
        return tokens;
    }
    std::string apply_chat_template(const std::vector<Message> &messages, bool add_generation_prompt = true) const {
        std::vector<mruntime_message> list;
        for (const Message &m : messages) list.push_back({m.role.c_str(), m.content.c_str()});
        std::size_t n;
        check(mruntime_apply_chat_template(get(), list.data(), list.size(), add_generation_prompt, nullptr, 0, &n));
        std::string text(n + 1, '\0');
        check(mruntime_apply_chat_template(get(), list.data(), list.size(), add_generation_prompt, text.data(), n + 1, &n));
        text.resize(n);
        return text;
    }
#endif

private:
    struct Close { void operator()(mruntime_model *model) const { mruntime_model_close(&model); } };
    std::unique_ptr<mruntime_model, Close> handle_;
};

class Session {
public:
    explicit Session(const Model &model, const mruntime_session_options *options = nullptr) {
        mruntime_session *session;
        check(mruntime_session_create(model.get(), options, &session));
        handle_.reset(session);
    }
    mruntime_session *get() const { return handle_.get(); }

    // Makes `tokens` the text, and returns how many of them were there already.
    std::size_t prefill(const Tokens &tokens) {
        std::size_t reused;
        check(mruntime_session_prefill(get(), tokens.data(), tokens.size(), &reused));
        return reused;
    }
    std::uint32_t next() { std::uint32_t token; return check(mruntime_session_next(get(), &token)), token; }
#ifdef MRUNTIME_TEXT
    // Calls `on_text` with pieces of the answer; it returns whether to go on. What it throws ends the answer, too.
    mruntime_generated generate(std::uint64_t max_tokens, std::function<bool(std::string_view)> on_text) {
        struct Call { std::function<bool(std::string_view)> &on_text; std::exception_ptr thrown; } call{on_text, nullptr};
        // An exception must not pass through the library.
        auto run = [](void *user, const char *utf8, std::size_t length) -> std::int32_t {
            Call &call = *static_cast<Call *>(user);
            try {
                return !call.on_text({utf8, length});
            } catch (...) {
                call.thrown = std::current_exception();
                return 1;
            }
        };
        mruntime_generated done{};
        done.size = sizeof done;
        mruntime_status status = mruntime_session_generate_text(get(), max_tokens, run, &call, &done);
        if (call.thrown) std::rethrow_exception(call.thrown);
        check(status);
        return done;
    }
#endif

private:
    struct Close { void operator()(mruntime_session *session) const { mruntime_session_close(&session); } };
    std::unique_ptr<mruntime_session, Close> handle_;
};

} // namespace mruntime

#endif

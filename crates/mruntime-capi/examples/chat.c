/* Chats with a model: chat FILE.mrt */
#include <mruntime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void check(mruntime_status status) {
    if (status == MRUNTIME_OK) return;
    fprintf(stderr, "error: %s\n", mruntime_last_error());
    exit(1);
}
static int print(void *answer, const char *utf8, size_t length) {
    strncat(answer, utf8, 8191 - strlen(answer));
    return fwrite(utf8, 1, length, stdout) != length || fflush(stdout) != 0;
}

int main(int argc, char **argv) {
    if (argc != 2) return fprintf(stderr, "usage: chat FILE.mrt\n"), 2;
    mruntime_model *model;
    mruntime_session *session;
    check(mruntime_model_open(argv[1], NULL, &model));
    check(mruntime_session_create(model, NULL, &session));
    static char said[64][8192], text[65536];
    static uint32_t tokens[65536];
    mruntime_message messages[64];
    for (size_t n = 0; n + 1 < 64; n += 2) {
        if (printf("> "), fflush(stdout), !fgets(said[n], sizeof said[n], stdin)) break;
        said[n][strcspn(said[n], "\n")] = 0;
        messages[n] = (mruntime_message){"user", said[n]};
        messages[n + 1] = (mruntime_message){"assistant", said[n + 1]};
        size_t length, count;
        check(mruntime_apply_chat_template(model, messages, n + 1, 1, text, sizeof text, &length));
        check(mruntime_tokenize(model, text, length, MRUNTIME_SPECIAL_PARSE, tokens, 65536, &count));
        check(mruntime_session_prefill(session, tokens, count, NULL)); /* what was said before is not computed again */
        check(mruntime_session_generate_text(session, 1000, print, said[n + 1], NULL));
        printf("\n");
    }
    mruntime_session_close(&session);
    mruntime_model_close(&model);
}

/* Chats with a model: chat FILE.mrt */
#define _POSIX_C_SOURCE 200809L /* for getline and open_memstream */
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
    fwrite(utf8, 1, length, answer);
    return fwrite(utf8, 1, length, stdout) != length || fflush(stdout) != 0;
}

int main(int argc, char **argv) {
    if (argc != 2) return fprintf(stderr, "usage: chat FILE.mrt\n"), 2;
    mruntime_model *model;
    mruntime_session *session;
    check(mruntime_model_open(argv[1], NULL, &model));
    check(mruntime_session_create(model, NULL, &session));
    static char text[65536];
    static uint32_t tokens[65536];
    char *said[64] = {0};
    mruntime_message messages[64];
    for (size_t n = 0; n < 64; n += 2) {
        size_t size = 0, length, count;
        if (printf("> "), fflush(stdout), getline(&said[n], &size, stdin) < 0) break;
        said[n][strcspn(said[n], "\n")] = 0;
        messages[n] = (mruntime_message){"user", said[n]};
        check(mruntime_apply_chat_template(model, messages, n + 1, 1, text, sizeof text, &length));
        check(mruntime_tokenize(model, text, length, MRUNTIME_SPECIAL_PARSE, tokens, 65536, &count));
        check(mruntime_session_prefill(session, tokens, count, NULL)); /* what was said before is not computed again */
        FILE *answer = open_memstream(&said[n + 1], &size);
        if (!answer) return perror("chat"), 1;
        check(mruntime_session_generate_text(session, 1000, print, answer, NULL));
        fclose(answer);
        messages[n + 1] = (mruntime_message){"assistant", said[n + 1]};
        printf("\n");
    }
    for (size_t n = 0; n < 64; n++) free(said[n]);
    mruntime_session_close(&session);
    mruntime_model_close(&model);
}

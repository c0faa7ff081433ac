/* Continues token ids, for programs with a tokenizer of their own: ids FILE.mrt COUNT ID... */
#include <mruntime.h>
#include <stdio.h>
#include <stdlib.h>

static void check(mruntime_status status) {
    if (status == MRUNTIME_OK) return;
    fprintf(stderr, "error: %s\n", mruntime_last_error());
    exit(1);
}
static int print(void *unused, uint32_t token) {
    (void)unused;
    return printf("%u\n", (unsigned)token) < 0;
}

int main(int argc, char **argv) {
    if (argc < 4) return fprintf(stderr, "usage: ids FILE.mrt COUNT ID...\n"), 2;
    mruntime_model *model;
    mruntime_session *session;
    check(mruntime_model_open(argv[1], NULL, &model));
    check(mruntime_session_create(model, NULL, &session));
    size_t count = (size_t)argc - 3;
    uint32_t *prompt = malloc(count * sizeof *prompt);
    if (!prompt) return perror("ids"), 1;
    for (size_t i = 0; i < count; i++) prompt[i] = (uint32_t)strtoul(argv[i + 3], NULL, 10);
    check(mruntime_session_feed(session, prompt, count)); /* all at once: many tokens are computed together */
    free(prompt);
    check(mruntime_session_generate(session, strtoull(argv[2], NULL, 10), print, NULL, NULL));
    mruntime_session_close(&session);
    mruntime_model_close(&model);
}

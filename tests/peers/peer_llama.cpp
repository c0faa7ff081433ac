// peer_llama MODEL.gguf TOKENS.json THREADS MODE REPETITIONS: see peers.py, which starts it and reads its one line of JSON; in
// mode `turns`, one for each number of tokens on standard input.
#include "llama.h"

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <string>
#include <time.h>
#include <vector>

static double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void print(const char * name, const std::vector<double> & values, size_t first) {
    printf("\"%s\": [", name);
    for (size_t i = first; i < values.size(); i++) printf("%s%.10g", i > first ? ", " : "", values[i]);
    printf("]");
}

int main(int argc, char ** argv) {
    const double start = atof(getenv("PEER_START"));
    if (argc != 6) return 2;
    const int threads = atoi(argv[3]), repetitions = atoi(argv[5]);

    llama_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    llama_backend_init();
    llama_model * model = llama_model_load_from_file(argv[1], llama_model_default_params());
    if (!model) return 1;
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 1024;
    params.n_batch = params.n_ubatch = 512;
    params.n_threads = params.n_threads_batch = threads;
    llama_context * context = llama_init_from_model(model, params);
    if (!context) return 1;
    const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    const double ready = now() - start;

    std::vector<llama_token> tokens;
    std::ifstream file(argv[2]);
    for (int id; file.ignore(1) && file >> id;) tokens.push_back(id);
    if (tokens.size() < 512) return 1;

    // The most likely token after `ids`; the context keeps count of positions, and computes the last one's logits only.
    auto step = [&](std::vector<llama_token> ids) {
        if (llama_decode(context, llama_batch_get_one(ids.data(), ids.size())) != 0) exit(1);
        const float * logits = llama_get_logits_ith(context, -1);
        int best = 0;
        for (int i = 1; i < vocab; i++) if (logits[i] > logits[best]) best = i;
        return best;
    };
    auto prompt = [&](int n) {
        llama_memory_clear(llama_get_memory(context), true);
        return step({tokens.begin(), tokens.begin() + n});
    };
    if (std::string(argv[4]) == "start") {
        const int token = prompt(16);
        printf("{\"ready\": %.6f, \"first\": %.6f, \"tokens\": [%d]}\n", ready, now() - start, token);
        return 0;
    }
    if (std::string(argv[4]) == "turns") {
        prompt(32);
        for (int n; scanf("%d", &n) == 1;) {
            llama_memory_seq_rm(llama_get_memory(context), -1, 32, -1);
            for (int i = 0; i < n; i++) {
                const double begin = now();
                if (llama_decode(context, llama_batch_get_one(&tokens[32 + i], 1)) != 0) return 1;
                llama_get_logits_ith(context, -1);
                printf("%s%.9f", i ? ", " : "[", now() - begin);
            }
            printf("]\n");
            fflush(stdout);
        }
        return 0;
    }
    std::vector<double> prefill, decode, chosen;
    for (int i = 0; i <= repetitions; i++) {
        const double begin = now();
        prompt(512);
        prefill.push_back(512 / (now() - begin));
    }
    for (int i = 0; i <= repetitions; i++) {
        int token = prompt(32);
        chosen.assign(1, token);
        const double begin = now();
        for (int j = 0; j < 64; j++) chosen.push_back(token = step({token}));
        decode.push_back(64 / (now() - begin));
    }
    chosen.resize(8);
    printf("{");
    print("prefill", prefill, 1);
    printf(", ");
    print("decode", decode, 1);
    printf(", ");
    print("tokens", chosen, 0);
    printf("}\n");
    return 0;
}

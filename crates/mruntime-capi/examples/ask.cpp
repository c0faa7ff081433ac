// Asks a model a question: ask FILE.mrt QUESTION
#include <iostream>
#include <mruntime.hpp>

int main(int argc, char **argv) try {
    if (argc != 3) return std::cerr << "usage: ask FILE.mrt QUESTION\n", 2;
    mruntime::Model model(argv[1]);
    mruntime::Session session(model);
    std::string text = model.apply_chat_template({{"user", argv[2]}});
    session.prefill(model.tokenize(text, MRUNTIME_SPECIAL_PARSE));
    session.generate(1000, [](std::string_view piece) { return bool(std::cout << piece << std::flush); });
    std::cout << '\n';
} catch (const std::exception &error) {
    return std::cerr << "error: " << error.what() << '\n', 1;
}

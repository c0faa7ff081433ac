// What a callback throws leaves Session::generate, and the session goes on: throws FILE.mrt
#include <iostream>
#include <mruntime.hpp>

int main(int, char **argv) {
    mruntime::Model model(argv[1]);
    mruntime::Session session(model);
    session.prefill(model.tokenize("The capital of France is"));
    int calls = 0;
    try {
        session.generate(10, [&](std::string_view) -> bool { calls++; throw std::out_of_range("enough"); });
    } catch (const std::out_of_range &error) {
        mruntime_generated done = session.generate(3, [](std::string_view) { return true; });
        std::cout << error.what() << " after " << calls << ", then " << done.tokens << " more\n";
    }
}

// Stages of one computation in one parallel region: each begins when the one before is done.
//
// A stage is done when all its pieces are, whichever threads took them and however many there are; a
// thread that comes late, or never, holds nobody up.
#pragma once

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace auxkern {

template <class Task>
struct Stage {
    void (*kernel)(const Task &, int64_t begin, int64_t end, float *scratch);
    int64_t pieces, grab;
};

template <class Task, int MOST>
struct Stages {
    const Task *task;
    float *scratch;  // scratch_floats for each thread, or null
    int64_t scratch_floats;
    int count = 0;
    Stage<Task> stages[MOST];
    std::atomic<int64_t> threads_begun{0};

    Stages(const Task &task, float *scratch, int64_t scratch_floats)
        : task(&task), scratch(scratch), scratch_floats(scratch_floats) {}

    void add(Stage<Task> stage) {
        if (stage.pieces > 0) stages[count++] = stage;
    }

    // What in_parallel() runs.
    static void body(void *context) {
        auto &all = *static_cast<Stages *>(context);
        float *scratch = all.scratch;
        if (scratch) scratch += all.threads_begun.fetch_add(1, std::memory_order_relaxed) * all.scratch_floats;
        for (int i = 0; i < all.count; ++i) {
            const Stage<Task> &stage = all.stages[i];
            Progress &progress = all.progress[i];
            for (;;) {
                const int64_t begin = progress.next.fetch_add(stage.grab, std::memory_order_relaxed);
                if (begin >= stage.pieces) break;
                const int64_t end = std::min(begin + stage.grab, stage.pieces);
                stage.kernel(*all.task, begin, end, scratch);
                progress.done.fetch_add(end - begin, std::memory_order_release);
            }
            wait(progress.done, stage.pieces);
        }
    }

private:
    struct alignas(64) Progress {
        std::atomic<int64_t> next{0}, done{0};
    };
    Progress progress[MOST];

    static void wait(const std::atomic<int64_t> &done, int64_t pieces) {
        constexpr int SPINS = 4000;  // about 100 us; then the thread that is waited for may want this core
        for (int spin = 0; done.load(std::memory_order_acquire) < pieces; ++spin) {
            if (spin >= SPINS) sched_yield();
#if defined(__x86_64__)
            else _mm_pause();
#endif
        }
    }
};

}  // namespace auxkern

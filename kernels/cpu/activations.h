// The activations that stand between two products, on vectors.
#pragma once

#include "auxkern.h"
#include "simd.h"

namespace {

// x * sigmoid(x); exp(-x) is cut off where it has long swallowed the 1.
inline vf silu(vf x) { return x / (1.0f + vexp(choose(-x > 88.0f, splat(88.0f), -x))); }

inline vf gelu_tanh(vf x) {
    const vf inner = 0.797884560802865f * (x + 0.044715f * x * x * x);
    return 0.5f * x * (1.0f + vtanh(inner));
}

// x * Phi(x), where Phi(-|x|) = exp(-x^2 / 2) t q(t), t = 1 / (1 + 0.35 |x|): q was fitted for the least
// relative error, 5e-8. No difference of nearly equal numbers is taken, so that small results keep their places.
inline vf gelu_erf(vf x) {
    const vf magnitude = vabs(x), t = 1.0f / (1.0f + 0.35f * magnitude);
    vf q = splat(-0.5f * 5.705914760e-02f);
    q = q * t + 0.5f * 2.825312082e-01f;
    q = q * t - 0.5f * 5.014504327e-01f;
    q = q * t + 0.5f * 3.083075433e-01f;
    q = q * t - 0.5f * 4.022038932e-02f;
    q = q * t + 0.5f * 2.088495181e-01f;
    q = q * t + 0.5f * 2.401246032e-01f;
    q = q * t + 0.5f * 2.796719563e-01f;
    q = q * t + 0.5f * 2.792451781e-01f;
    const vf tail = vexp(-0.5f * x * x) * t * q;
    return x * choose(x < 0.0f, tail, 1.0f - tail);
}

inline vf activated(int32_t activation, vf x) {
    switch (activation) {
        case AUXKERN_SILU: return silu(x);
        case AUXKERN_GELU_TANH: return gelu_tanh(x);
        case AUXKERN_GELU_ERF: return gelu_erf(x);
        case AUXKERN_RELU: return choose(x < 0.0f, splat(0), x);  // keeps NaN
        default: return x;
    }
}

}  // namespace

// The activations that stand between two products, on vectors.
#pragma once

#include "auxkern.h"
#include "simd.h"

namespace {

// x * sigmoid(slope): with the exponential of what is below 0 alone, small results keep their places.
inline vf times_sigmoid(vf x, vf slope) {
    const vf e = vexp(-vabs(slope));
    return x * choose(slope < 0.0f, e, splat(1)) / (1.0f + e);
}

// x (1 + tanh(t)) / 2 = x sigmoid(2 t), t = sqrt(2 / pi) (x + 0.044715 x^3).
inline vf gelu_tanh(vf x) { return times_sigmoid(x, 1.595769121605731f * (x + 0.044715f * x * x * x)); }

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
        case AUXKERN_SILU: return times_sigmoid(x, x);
        case AUXKERN_GELU_TANH: return gelu_tanh(x);
        case AUXKERN_GELU_ERF: return gelu_erf(x);
        case AUXKERN_RELU: return choose(x < 0.0f, splat(0), x);  // keeps NaN
        default: return x;
    }
}

}  // namespace

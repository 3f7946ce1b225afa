"""DARTS's second-order architecture step, an alternative to P-DARTS's: `Search(..., architect=SecondOrder)`."""

from __future__ import annotations

import torch

from pdarts import Architect, InputError, loss_and_logits, require_gradients


class SecondOrder(Architect):
    """The gradient of the alphas at the weights after one more step of `weight_optimizer`, SGD with momentum and decay.

    Weights and optimizer are left unchanged; running statistics of batch norms see the additional forward passes.
    """

    difference = 0.01  # length of the finite difference (DARTS, sec. 2.3)

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        if self.weight_optimizer is None:
            raise InputError("weight_optimizer is None; expected the SGD optimizer of the weights")

    def gradients(self, images, labels, train_images, train_labels):
        """DARTS, eq. 7 and 8, with grad the gradient for alpha:

            grad L_val(w', alpha) - lr * (grad L_train(w+, alpha) - grad L_train(w-, alpha)) / (2 eps)

        where w' = w - lr * (momentum + grad_w L_train + decay * w) and w+- = w +- eps * grad_w' L_val(w', alpha).
        """
        group, weights, alphas = self.weight_optimizer.param_groups[0], self.weights, self.alphas
        require_gradients([*weights, *alphas])
        start = [w.detach().clone() for w in weights]

        def move_to(points):
            with torch.no_grad():
                for w, point in zip(weights, points):
                    w.copy_(point)

        try:
            loss, _ = loss_and_logits(self.network, train_images, train_labels, self.dtype)
            gradients = self.average(torch.autograd.grad(loss, weights))
            unrolled = []
            for w, w_start, gradient in zip(weights, start, gradients):
                step = gradient + group["weight_decay"] * w_start
                momentum = self.weight_optimizer.state.get(w, {}).get("momentum_buffer")
                if momentum is not None:
                    step = step + group["momentum"] * momentum
                unrolled.append(w_start - group["lr"] * step)
            move_to(unrolled)
            loss, logits = self.loss(images, labels)
            gradients = self.average(torch.autograd.grad(loss, [*weights, *alphas]))
            gradients, direct = gradients[:-2], gradients[-2:]

            eps = self.difference / torch.stack([g.norm() for g in gradients]).norm().clamp_min(1e-30)
            require_gradients(alphas, not_of=weights)
            sides = []
            for sign in (1, -1):
                move_to([w + sign * eps * g for w, g in zip(start, gradients)])
                # The same dropout on both sides, or its noise would drown the difference.
                with torch.random.fork_rng(range(torch.cuda.device_count())):
                    train_loss, _ = loss_and_logits(self.network, train_images, train_labels, self.dtype)
                sides.append(self.average(torch.autograd.grad(train_loss, alphas)))
        finally:
            move_to(start)
        implicit = [(plus - minus) / (2 * eps) for plus, minus in zip(*sides)]
        return loss, logits, [d - group["lr"] * i for d, i in zip(direct, implicit)]

"""The transformer block: attend, then feed."""

from collections.abc import Callable
from dataclasses import replace

from jaxtyping import Bool, Int
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor

from fewtokens.layers.attention import Attention, Evidence
from fewtokens.tokens import Tokens, take

Choice = tuple[Int[Tensor, "b k"], Bool[Tensor, "b k"] | None]


class Block(TimmBlock):
    """timm's pre-norm block, with its parameters and names, over `Tokens` and in two halves.

    Tokenizers act before, between or around the halves. Handed to timm as `block_fn=Block, attn_layer=Attention`.
    """

    attn: Attention

    def attend(self, tokens: Tokens, choose: Callable[[Evidence], Choice] | None = None) -> tuple[Tokens, Evidence]:
        """x + attention(norm(x)), and what the attention saw.

        Args:
            tokens: What attends.
            choose: Says, before any attention is paid for, which patches go on: index and mask as `Tokens.select` takes
                them. The others are still looked at (keys, values) but do not look (queries, projection). It sees the
                queries of the prefix alone.
        """
        x = self.norm1(tokens.x)
        if choose is None:
            evidence = asked = self.attn.observe(x, tokens.bias(), keep=tokens.keep)
        else:
            evidence = self.attn.observe(x, tokens.bias(), first=tokens.prefix)
            index, mask = choose(evidence)
            x = take(x, tokens.rows(index))
            asked = replace(evidence, query=self.attn.queries(x))
            tokens = tokens.select(index, mask)
        return tokens.update(tokens.x + self.drop_path1(self.ls1(self.attn.mix(asked, x)))), evidence

    def feed(self, tokens: Tokens) -> Tokens:
        """x + mlp(norm(x))."""
        tokens = tokens.update(tokens.x + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens.x)))))
        if tokens.trace is not None:
            tokens.trace.append(tokens)
        return tokens

    def forward(self, tokens: Tokens) -> Tokens:  # type: ignore[override]  # timm's takes a bare tensor
        """Both halves."""
        return self.feed(self.attend(tokens)[0])

"""The transformer block: attend, then feed."""

from timm.models.vision_transformer import Block as TimmBlock

from fewtokens.layers.attention import Attention, Evidence
from fewtokens.tokens import Tokens


class Block(TimmBlock):
    """timm's pre-norm block, with its parameters and names, over `Tokens` and in two halves.

    Tokenizers act before, between or around the halves. Handed to timm as `block_fn=Block, attn_layer=Attention`.
    """

    attn: Attention

    def attend(self, tokens: Tokens) -> tuple[Tokens, Evidence]:
        """x + attention(norm(x)), and what the attention saw."""
        x = self.norm1(tokens.x)
        evidence = self.attn.observe(x, tokens.bias())
        return tokens.update(tokens.x + self.drop_path1(self.ls1(self.attn.mix(evidence, x)))), evidence

    def feed(self, tokens: Tokens) -> Tokens:
        """x + mlp(norm(x))."""
        tokens = tokens.update(tokens.x + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens.x)))))
        if tokens.trace is not None:
            tokens.trace.append(tokens)
        return tokens

    def forward(self, tokens: Tokens) -> Tokens:  # type: ignore[override]  # timm's takes a bare tensor
        """Both halves."""
        return self.feed(self.attend(tokens)[0])

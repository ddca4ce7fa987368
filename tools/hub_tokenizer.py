"""The tokenizer of an exported model, with spaces between words that are given one by one.

    AutoTokenizer.from_pretrained(folder, trust_remote_code=True)

tools/export.py copies this file into the exported folder. Without trust_remote_code, `transformers`
loads the same tokenizer.json with a class of its own, which gives the same ids for texts.
"""

from transformers import BatchEncoding, PreTrainedTokenizerFast


class EncoderTokenizer(PreTrainedTokenizerFast):
    """Reads ["two", "words"] with is_split_into_words=True as it reads "two words".

    Inside a text, the space before a word is a part of its first token. The library reads each word
    of a list as a text of its own, so without a space it would get the tokens of a first word.
    """
    # There is no __init__ here: transformers would then not take tokenizer.json as it is.

    def _encode_plus(self, text, text_pair=None, *, is_split_into_words=False,
                     return_tensors=None, **kwargs):
        kwargs |= dict(is_split_into_words=is_split_into_words, return_tensors=return_tensors)
        way = self.init_kwargs.get("split_words", "add spaces")
        if is_split_into_words and way == "refuse":
            raise ValueError("this tokenizer drops the space before a text, so it cannot read "
                             "words one by one; give \" \".join(words)")
        # "have spaces": tokenizer.json puts one before every text
        if not is_split_into_words or way == "have spaces":
            return super()._encode_plus(text, text_pair, **kwargs)
        found = super()._encode_plus(with_spaces(text), with_spaces(text_pair), **kwargs)
        if "offset_mapping" in found:  # counts the characters of each word, so without the space
            added = [[int(bool(word)) for word in row.word_ids] for row in found.encodings]
            offsets = found["offset_mapping"]
            if return_tensors is not None:
                added = BatchEncoding(dict(added=added), tensor_type=return_tensors)["added"]
                found["offset_mapping"] = (offsets - added[..., None]).clip(0)
            elif offsets and isinstance(offsets[0], list):
                found["offset_mapping"] = [moved(*pair) for pair in zip(offsets, added)]
            else:
                found["offset_mapping"] = moved(offsets, added[0])
        return found


def moved(offsets, added):
    """(start, end) of each token, and how many characters were added before it."""
    return [(max(0, start - n), max(0, end - n)) for (start, end), n in zip(offsets, added)]


def with_spaces(words):
    """Words, or lists of them -> the same, with a space before each word but the first of a list.
    """
    if not isinstance(words, (list, tuple)):
        return words
    if not all(isinstance(word, str) for word in words):
        return type(words)(with_spaces(part) for part in words)
    return type(words)(word if i == 0 else " " + word for i, word in enumerate(words))

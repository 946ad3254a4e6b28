"""Varied strings for the tokenizer references: a fixed list and seeded mixtures of fragments."""

import random

CODE = [
    "fn main() {\n    println!(\"{}\", 1 + 2);\n}\n",
    "let mut v: Vec<u8> = Vec::with_capacity(0x1F);",
    "impl<'a, T: Into<f32> + ?Sized> Iterator for It<'a, T> {}",
    "#include <stdio.h>\nint main(void){ return printf(\"%d\\n\", 42) != 3; }",
    "template <typename T, int N> constexpr auto f(T&& t) -> decltype(t[N]) { return t[N]; }",
    "def f(x, *args, **kw):\n\treturn [i ** 2 for i in range(10) if i % 3 == 0]\n",
    "class A:\n    def __init__(self):\n        self.x = {'a': 1, \"b\": [2, 3]}\n\n",
    "for (let i = 0; i < arr.length; i++) { console.log(`${arr[i]} => ${i}`); }",
    "const {a, ...rest} = await fetch(url).then(r => r.json()) ?? {};",
    "SELECT id, COUNT(*) AS n FROM t WHERE x >= 10.5 AND y <> 'it''s' GROUP BY id;",
    "<!DOCTYPE html>\n<html><body class=\"a b\">&nbsp;&lt;</body></html>",
    "{\"key\": [1, 2.5e-3, null, true], \"nested\": {\"a\": \"\\u00e9\\n\"}}",
    "a:\n  - b: 1\n  - c: \"x\"\n    d: |\n      text\n",
    "if [ -z \"$1\" ]; then echo \"usage: $0 FILE\" >&2; exit 1; fi",
    "awk -F, '{s+=$3} END {print s/NR}' data.csv | sort -rn | head -n 20",
    "git commit -m 'Fix #123: off-by-one' && git push origin HEAD:main",
    "func (s *Server) Handle(w http.ResponseWriter, r *http.Request) error {\n\treturn nil\n}",
    "\\begin{align}\n  e^{i\\pi} + 1 &= 0 \\\\\n\\end{align}",
    "movl $0x10, %eax\n\tcall *%rdx\n.L3:\n\tret",
    "main :: IO ()\nmain = mapM_ (print . (*2)) [1..10]",
    "(define (fact n) (if (= n 0) 1 (* n (fact (- n 1)))))",
    "@media (max-width: 600px) { .a > .b:hover { margin: 0 auto !important; } }",
    "x = y<<3 | z>>2 & ~0xFF ^ 0b1010;",
    "http://user:pw@example.org:8080/a/b?x=1&y=%20z#frag",
    "C:\\Users\\me\\file.txt and /usr/lib/x86_64-linux-gnu/libc.so.6",
    "2001:db8::8a2e:370:7334 192.168.0.1/24 00:1A:2B:3C:4D:5E",
]

LANGUAGES = [
    "The quick brown fox jumps over the lazy dog.",
    "I'm sure you've heard it's what they'd say; we'll see, won't we? I'D SAY IT'S FINE.",
    "Falsches Üben von Xylophonmusik quält jeden größeren Zwerg.",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "Portez ce vieux whisky au juge blond qui fume, là-bas, où naît l'été.",
    "El pingüino Wenceslao hizo kilómetros bajo exhaustiva lluvia; ¿qué añoró? ¡Nada!",
    "Pijamalı hasta yağız şoföre çabucak güvendi. İstanbul ığdır",
    "Příliš žluťoučký kůň úpěl ďábelské ódy.",
    "Zażółć gęślą jaźń, Łódź",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "Kæmi ný öxi hér, ykist þjófum nú bæði víl og ádrepa.",
    "敏捷的棕色狐狸跳过了懒狗。",
    "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。",
    "人工智能（AI）在2024年的发展：100%超出预期！",
    "いろはにほへと ちりぬるを わかよたれそ つねならむ",
    "私は東京に住んでいます。カタカナとひらがなとｶﾅ。",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "대한민국 서울특별시 2024년 12월 25일",
    "نص حكيم له سر قاطع وذو شأن عظيم مكتوب على ثوب أخضر",
    "السَّلَامُ عَلَيْكُمْ ١٢٣٤٥",
    "דג סקרן שט בים מאוכזב ולפתע מצא לו חברה",
    "שָׁלוֹם עֲלֵיכֶם",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश १२३",
    "নিশি অবসান, ওই পুরাতন বর্ষ হয় গত",
    "யாமறிந்த மொழிகளிலே தமிழ்மொழி போல்",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า ๑๒๓",
    "ប្រទេសកម្ពុជា ២០២៤",
    "ინგლისური ენა და ქართული ანბანი",
    "Բարեւ աշխարհ, ինչպե՞ս ես",
    "ሰላም ለዓለም",
    "Tiếng Việt có dấu: ắ ằ ẳ ẵ ặ đ ư ơ",
    "ᚠᛇᚻ᛫ᛒᛦᚦ᛫ᚠᚱᚩᚠᚢᚱ",
    "བོད་སྐད་ཡིག",
    "မြန်မာဘာသာ",
    "Монгол хэл ᠮᠣᠩᠭᠣᠯ",
]

EMOJI = [
    "😀", "👍🏽", "👨‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷🇩🇪🇯🇵", "❤️", "☕️ ✈︎", "1️⃣2️⃣", "🧑🏿‍🚀", "🤷‍♀️", "🫠🪿🫨", "𝕳𝖊𝖑𝖑𝖔",
    "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "⚠️⛔🔥✅", "👩🏻‍❤️‍💋‍👩🏾", "🐛->🦋", "🎉🎉🎉",
]

SPACES = [
    " ", "  ", "   ", "    ", "     ", "        ", " " * 13, " " * 16, " " * 31, " " * 64, " " * 100,
    "\t", "\t\t", "\t\t\t\t", " \t ", "\n", "\n\n", "\n\n\n", "\n" * 8, "\r\n", "\r\n\r\n", "\r", " \n",
    "\n ", " \n \n ", "\t\n\t", "\u00a0", "\u00a0\u00a0", "\u2003", "\u3000", "\u200b", "\u2028", "\ufeff",
    "\v", "\f", "\u0085", "\u1680", "\u202f",
]

NUMBERS = [
    "0", "7", "10", "123", "2024", "3.14159265358979", "1,000,000", "-42", "+49 30 1234567", "1e-10", "0xDEADBEEF",
    "12:34:56.789", "2024-02-29T23:59:60Z", "50%", "$1,234.56", "€99,99", "1/2 + 3/4 = 5/4", "v1.2.3-rc.4+build5",
    "½ ¾ ² ³ ₄", "Ⅷ Ⅻ", "①②③⑳", "௧௨௩", "٣٫١٤", "９８７", "x1y22z333", "1 2  3   4", "99999999999999999999999", "٠١٢",
    "一二三1二", "4x4", "H2O", "mp3", "a1", "1a", " 1", "1 ", "\n1\n", "#1", "(1)", "1st 2nd 3rd", "𝟘𝟙𝟚", "꘠꘡",
]

SPECIAL = [
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_start|>user\nHi<|im_end|>\n", "a<|im_end|>b", " <|im_end|> ",
    "<|im_end|><|im_end|>", "<|im_end", "<|IM_END|>", "<| im_end |>", "<|im_start|><|im_end|><|endoftext|>",
    "<repo_name>foo/bar<file_sep>", "<filename>a.py<gh_stars>10-100", "<issue_start>text<issue_comment>x<issue_closed>",
    "<jupyter_start><jupyter_text>t<jupyter_code>c<jupyter_output>o<empty_output>", "<reponame>", "<jupyter_script>",
    "<s></s><unk><pad>", "[INST] x [/INST]", "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
    "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>", "<tool_call>\n{}\n</tool_call>", "Ġ Ċ ĉ Ã ©", "<0x0A>", "▁▁a",
]

MARKS = [
    "é", "e\u0301", "ñ n\u0303", "Å A\u030a Å", "Z\u0351\u036b\u0343a\u0310\u0355l\u034bg\u0300o\u0321", "ﬁ ﬂ ﬀ", "ſ ß ẞ",
    "\u0301", "a\u200db", "a\u200cb", "\u202eabc\u202c", "ク\u3099", "한\u1112\u1161\u11ab", "İi̇ıI", "ǅ ǆ Ǆ", "Ω Ω",
    "naïve café Ünïcödé", "x̄ y̅ ẑ", "q̣̇", "👍\u200d", "\ufe0f", "\u00ad", "“quotes” ‘single’ «guillemets» „low“",
    "en–dash em—dash … ellipsis", "→ ⇒ ∀x∈ℝ ∃y: x²≥0 ∧ ¬∅ ∫∑∏√∞≈≠≤", "■□▪◆●○★☆♠♣♥♦", "│├└─┌┐", "¹⁄₂ ℃ ㎏ ㈱ №",
    "\ue000", "\U000f0000", "\U0010ffff", "\uffff", "𐍈𐎀𐤀", "𒀀𒁀", "𠀀𪛖", "𝠀𝤛", "\ufffd",
]

WORDS = [
    "", "a", "I", "the", " the", "The", " THE", "hello", "Hello, world!", "don't", "DON'T", "can't've", "it's", "'s", "'S",
    "'tis", "O'Brien's", "rock'n'roll", "they'll we've I'd I'm you're", "’s it’s", "co-operate", "e.g.", "U.S.A.", "Mr. X",
    "foo_bar_baz", "__init__", "camelCaseIdentifier", "SCREAMING_SNAKE", "kebab-case-name", "a.b.c", "...", "....", "!!!",
    "?!?!", "(((", "))))", "[[]]", "{}{}", "***", "---", "=====", "~~~~", "<<<>>>", "::", ";;", ",,", "\"\"", "''", "``", "\\\\",
    "//", "/* */", "<!-- -->", "#!/", "@@", "$$", "%%", "^^", "&&", "||", "a" * 50, "a" * 300, "ab" * 100, "xyzzy" * 40,
    "supercalifragilisticexpialidocious", "pneumonoultramicroscopicsilicovolcanoconiosis", "qwrtpsdfghjklzxcvbnm",
    "ACGT" * 40, "deadbeef" * 16, "SGVsbG8gd29ybGQhIFRoaXMgaXMgYmFzZTY0Lg==", "\x00", "\x01\x02\x03", "\x04\x06\x13\x14\x16\x1d",
    "\x07\x08\x0b\x0c\x0e\x1b[31mred\x1b[0m", "\x7f", "a\x00b", "a\x04b", "\x80\x9f", "\u0378", "end ", " start", " both ",
    "two  spaces", "tab\there", "line\nbreak", "trail   \n  lead", "a \n b", "mixed \t\n\r\n end", "x\n\n\ny", "    indented",
    "\tindented", "a    b     c", "   a", "a   ", "  \n  a", "word" + " " * 40 + "word", "Ünder the Ġ", "NaN inf -0.0", "null",
]

POOLS = [CODE, LANGUAGES, EMOJI, SPACES, NUMBERS, SPECIAL, MARKS, WORDS]


def random_text(rng):
    """A run of random code points from blocks that tokenizers treat differently."""
    blocks = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF), (0xE00, 0x0FFF),
              (0x2000, 0x2BFF), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0x00, 0x1F),
              (0x10000, 0x1FFFF)]
    out = []
    for _ in range(rng.randint(1, 5)):
        low, high = rng.choice(blocks)
        out.extend(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8)))
    return "".join(out)


def strings(seed, mixtures):
    """Every fixed string once, then `mixtures` seeded joins of fragments. No surrogates, no duplicates."""
    rng = random.Random(seed)
    out = [s for pool in POOLS for s in pool]
    glue = ["", "", " ", "\n", "\t", ", ", "  "]
    while mixtures > 0:
        parts = []
        for _ in range(rng.randint(2, 6)):
            part = random_text(rng) if rng.random() < 0.2 else rng.choice(rng.choice(POOLS))
            if len(part) > 40:
                start = rng.randrange(len(part) - 20)
                part = part[start:start + rng.randint(5, 40)]
            parts.append(part + rng.choice(glue))
        text = "".join(parts)
        if text not in out:
            out.append(text)
            mixtures -= 1
    return list(dict.fromkeys(out))


if __name__ == "__main__":
    made = strings(1, 300)
    print(len(made), "strings,", sum(map(len, made)), "characters")

"""How well a vocabulary compresses: bytes per token, by kind of text.

The samples are short, written for this file, and so in no training set; longer ones move the figures by a few
percent. Higher is better: the same model sees more text in the same number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import tiktoken
import tiktoken.load

_ENGLISH = """\
The harbour froze on the second night of January, and by morning the children were already testing the ice
with sticks. Old Maren, who had seen eighty winters there, told them to keep away from the mouth of the river,
where the current stays warm and the ice is thin. Nobody listened, of course. By noon a dog had fallen in, and
it took three fishermen, a ladder and a good deal of shouting to get it out again. "You see?" she said, but
she was laughing, and she brought the dog a blanket.

Salt lowers the temperature at which water freezes because dissolved ions get in the way of the crystal. Sea
water, at about 35 grams of salt per litre, freezes near minus two degrees; a saturated brine needs minus
twenty-one. That is why roads are salted before a frost rather than after it, and why salting does little
during the coldest weeks of the year.
"""

_CODE = """\
def shortest_path(graph: dict[str, dict[str, float]], start: str, goal: str) -> list[str]:
    queue = [(0.0, start, [start])]
    seen = set()
    while queue:
        cost, node, path = heapq.heappop(queue)
        if node == goal:
            return path
        if node in seen:
            continue
        seen.add(node)
        for neighbour, weight in graph[node].items():
            if neighbour not in seen:
                heapq.heappush(queue, (cost + weight, neighbour, [*path, neighbour]))
    raise ValueError(f"no path from {start!r} to {goal!r}")

static size_t count_lines(const char *text, size_t length) {
    size_t lines = 0;
    for (size_t i = 0; i < length; i++) {
        if (text[i] == '\\n') lines++;
    }
    return lines;
}

SELECT c.name, COUNT(*) AS orders FROM customers c JOIN orders o ON o.customer_id = c.id
WHERE o.created_at >= '2024-01-01' GROUP BY c.name HAVING COUNT(*) > 3 ORDER BY orders DESC;
"""

_MATH = """\
Let f(x) = 3x^2 - 12x + 7. Then f'(x) = 6x - 12 = 0 gives x = 2, and f(2) = 12 - 24 + 7 = -5, the minimum.
Sum of the first 100 squares: n(n+1)(2n+1)/6 = 100 * 101 * 201 / 6 = 338350.
If P(A) = 0.35, P(B) = 0.5 and P(A and B) = 0.175, then A and B are independent, since 0.35 * 0.5 = 0.175.
$$\\int_0^1 x^2 e^{-x}\\,dx = 2 - \\frac{5}{e} \\approx 0.1606, \\quad \\sum_{k=0}^\\infty \\frac{1}{k!} = e$$
48 boxes at $17.25 each cost 48 * 17.25 = $828.00; with 8.5% tax that is 828 * 1.085 = $898.38.
1024 2048 4096 8192 16384 32768 65536 | 3.14159265 2.71828183 1.61803399 | 6.022e23 1.381e-23 299792458
2023-11-05 14:07:33 192.168.10.254 +44 20 7946 0018 0x7fff5fbff8c0 1,000,000 7/8 99.9% 12:45
"""

_NON_LATIN = """\
Весной река разлилась, и до соседней деревни можно было добраться только на лодке.
Την άνοιξη το ποτάμι πλημμύρισε και στο διπλανό χωριό έφτανε κανείς μόνο με βάρκα.
春天河水上涨，只有坐船才能到邻村去。老人说，这样的大水三十年没有见过了。
春になると川があふれ、隣の村へは舟でしか行けなくなった。
봄이 되자 강물이 넘쳐서 이웃 마을에는 배로만 갈 수 있었다.
في الربيع فاض النهر، ولم يعد الوصول إلى القرية المجاورة ممكنا إلا بالقارب.
באביב עלה הנהר על גדותיו, ואל הכפר השכן אפשר היה להגיע רק בסירה.
वसंत में नदी में बाढ़ आ गई, और पड़ोसी गाँव तक केवल नाव से ही पहुँचा जा सकता था।
ในฤดูใบไม้ผลิแม่น้ำเอ่อล้น และไปหมู่บ้านข้างเคียงได้โดยเรือเท่านั้น
Im Frühling trat der Fluß über die Ufer; 🚣 am nächsten Tag schien wieder die Sonne. ☀️🎉
"""

_MARKUP = """\
<article class="card" id="harbour">
  <h2>The frozen harbour</h2><p>By noon <em>a dog</em> had fallen in&hellip;</p>
  <ul><li><a href="/stories/1?lang=en&amp;page=2">Read more</a></li><li><img src="dog.png" alt=""></li></ul>
</article>

# Frozen harbour

| Month | Mean (°C) | Ice days |
| ----- | --------: | -------: |
| Jan   |      -4.1 |       22 |
| Feb   |      -3.7 |       19 |

- [x] buy **salt**
- [ ] call `maren@example.org`

{"id": 17, "title": "The frozen harbour", "tags": ["winter", "dog"], "published": true, "rating": null}

server:
  host: 0.0.0.0
  ports: [8080, 8443]
  tls: {certificate: /etc/tls/server.pem, key: /etc/tls/server.key}
"""

SAMPLES = {
    "English prose": _ENGLISH,
    "code": _CODE,
    "numbers and math": _MATH,
    "non-Latin scripts": _NON_LATIN,
    "markup": _MARKUP,
}

PUBLISHED = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}


def bytes_per_token(encode: Callable[[str], list[int]], text: str) -> float:
    return len(text.encode()) / len(encode(text))


def published_encoding(name: str) -> tiktoken.Encoding | None:
    """Return tiktoken's encoding `name` if its files are in tiktoken's cache, else None: never a download."""
    read_file = tiktoken.load.read_file
    tiktoken.load.read_file = _not_on_disk
    try:
        return tiktoken.get_encoding(name)
    except FileNotFoundError:
        return None
    finally:
        tiktoken.load.read_file = read_file


def _not_on_disk(blobpath: str) -> bytes:
    raise FileNotFoundError(blobpath)

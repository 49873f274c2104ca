"""The names of languages, as an instruction has them, and which one a prompt is in."""

from __future__ import annotations

from engine.caption_text import likeliest_language

_WORDS = """
    ace Acehnese af Afrikaans am Amharic an Aragonese ar Arabic ary Moroccan_Arabic arz
    Egyptian_Arabic as Assamese az Azerbaijani ba Bashkir bcl Central_Bikol be Belarusian bg
    Bulgarian bn Bengali br Breton bs Bosnian ca Catalan crh Crimean_Tatar cs Czech cy Welsh da
    Danish de German dz Dzongkha el Greek en English eo Esperanto es Spanish et Estonian eu
    Basque ext Extremaduran fa Persian fi Finnish fo Faroese fr French fuv Fulfulde fy Frisian
    ga Irish gcf Guadeloupean_Creole gcr Guianese_Creole gd Scottish_Gaelic gl Galician gom
    Konkani grc Ancient_Greek gu Gujarati gug Guarani guw Gun ha Hausa hbo Biblical_Hebrew he
    Hebrew hi Hindi hr Croatian ht Haitian_Creole hu Hungarian hy Armenian id Indonesian ig Igbo
    is Icelandic it Italian ja Japanese jv Javanese ka Georgian kab Kabyle kik Kikuyu kk Kazakh
    km Khmer kn Kannada ko Korean ku Kurdish ky Kyrgyz la Latin lb Luxembourgish lg Luganda lij
    Ligurian ln Lingala lo Lao lt Lithuanian ltg Latgalian lv Latvian mg Malagasy mk Macedonian
    ml Malayalam mn Mongolian mr Marathi ms Malay mt Maltese my Burmese nb Norwegian ne Nepali
    nl Dutch nn Norwegian_Nynorsk no Norwegian nso Northern_Sotho oc Occitan om Oromo or Odia pa
    Punjabi pcm Nigerian_Pidgin pl Polish ps Pashto pt Portuguese qu Quechua ro Romanian ru
    Russian rw Kinyarwanda sa Sanskrit sdh Southern_Kurdish se Northern_Sami si Sinhala sk
    Slovak sl Slovenian sn Shona so Somali sq Albanian sr Serbian st Southern_Sotho sv Swedish
    sw Swahili ta Tamil te Telugu tg Tajik th Thai tk Turkmen tl Tagalog tr Turkish tt Tatar ug
    Uyghur uk Ukrainian ur Urdu uz Uzbek uzs Southern_Uzbek vec Venetian vi Vietnamese vo
    Volapük wa Walloon wuu Wu_Chinese xh Xhosa yo Yoruba yue Cantonese zh Chinese zu Zulu
""".split()
NAMES = {code: name.replace("_", " ") for code, name in zip(_WORDS[::2], _WORDS[1::2], strict=True)}
"""English names of the languages that py3langid knows, by ISO 639-1 code."""


def language_of(prompt: str) -> str:
    """The English name of the language that a prompt is likeliest in.

    Misleading for a few words: name the language where it is known.

    Raises:
        ValueError: It is in none, such as a number.
    """
    code = likeliest_language(prompt)
    if code not in NAMES:
        raise ValueError(f"the language of {prompt!r} was not recognised: name it, e.g. French")
    return NAMES[code]

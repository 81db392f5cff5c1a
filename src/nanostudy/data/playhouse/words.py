"""The words, people and grammar of the plays, as tables."""

# People by circle: men; women. Speech uses the last word of a name; the whole name in upper case heads a speech.
PEOPLE = {
    "court": "Odran, King Ferrow, Cassin, Sir Quill, Hathmere; Marabel, Lady Isault, Wenna, Zephrine",
    "sea": "Brune, Old Jorrick, Skeld, Maddox, Xander; Thessaly, Captain Morwen, Kestra, Nan",
    "town": "Gubb, Doctor Umber, Pipkin, Crump, Fitch; Pell, Hostess Madge, Nurse Tibba, Lisbet",
    "wood": "Colm, Hermit Yarrow, Dunstan, Lob, Aldwyn; Hazel, Dilly, Old Linnet, Witch Orla",
}
HOMES = {"court": "crown heart", "sea": "ocean storm", "town": "feast purse", "wood": "forest grave"}
CRIES = {"court": "alas fie marry", "sea": "ahoy avast yo-ho", "town": "faith tush zounds", "wood": "lo hark hey-nonny"}
PRONOUNS = ({"$he": "he", "$him": "him", "$his": "his"}, {"$he": "she", "$him": "her", "$his": "her"})

# Topics: nouns; adjectives; transitive verbs; intransitive verbs, most frequent first. "a/b" is a word with an irregular
# plural or participle.
TOPICS = {
    "ocean": """ship wave sail oar gull net mast anchor rope sailor tide harbour shore pilot deck whale pearl cove
        island lantern reef pirate mermaid voyage rudder cabin compass herring lobster barnacle lighthouse; blue deep
        salt wet wide calm drowned briny restless sunken sea-worn distant foaming tattered far-sailing barnacled; steer
        haul cross sink/sunk catch/caught drown wreck moor board follow rescue chart plunder; row swim/swum drift float
        sway wander dive founder splash paddle capsize""",
    "storm": """wind cloud storm winter gust shower flood tempest season rainbow morning summer frost icicle evening
        puddle breeze hailstone autumn squall snowflake thunderclap raindrop chimney shutter blizzard whirlwind sunbeam
        eclipse weathercock; cold wild grey black windy bitter frozen misty sudden rainy stormy dreary raging pitiless
        moonless thunder-stricken; shake/shaken chase strike/struck bend/bent darken drench soak freeze/frozen scatter
        batter chill topple overturn; blow/blown rage howl roar melt drip/dripped tremble shiver whirl thunder whistle
        crackle""",
    "crown": """king crown queen duke law throne sword prince palace robe sceptre banner herald seal castle title
        council realm knight tower courtier shield baron minister soldier treaty trumpet cousin decree chancellor
        ambassador; noble proud royal high golden mighty loyal stately solemn gracious crowned lordly haughty jewelled
        ill-advised ambitious; obey rule serve banish defy betray command pardon exile flatter salute conquer dethrone;
        fall/fallen reign kneel/knelt rise/risen march yield parade triumph conspire hesitate abdicate surrender""",
    "heart": """vow kiss heart sigh ring lip letter lover bride song secret ribbon glove poet blush promise sonnet dream
        rose cheek wish whisper memory token suitor wedding tress maiden serenade sweetheart keepsake; fair true sweet
        soft false tender constant lovesick beloved blushing devoted moon-eyed graceful faithless heartsick; woo adore
        wound forgive/forgiven charm tempt embrace deceive remember cherish enchant worship/worshipped beguile;
        weep/wept pine burn smile faint swoon yearn dote tarry languish despair flutter""",
    "feast": """cup pie fool cook goose/geese barrel supper jest table kettle candle fiddle onion dancer apple bottle
        belly drum sausage cheese spoon tapster pudding flagon turnip radish dumpling biscuit custard innkeeper
        drunkard; fat merry warm round hungry jolly drunken noisy spiced plump roasted thirsty greasy sticky buttered
        three-legged; eat/eaten drink/drunk fill taste bake spill stir/stirred roast carve devour toast swallow gobble;
        sing/sung dance laugh snore revel hiccup belch stagger tumble carouse gossip chuckle""",
    "purse": """coin debt purse penny/pennies thief/thieves market shop hat wagon ledger lawyer bargain mule key
        merchant button tailor price cloak cobbler beggar tax miser needle cart basket guinea treasure farthing landlord
        contract; rich poor empty cheap silver greedy thrifty costly dusty patched shabby precious well-worn bankrupt
        threadbare counterfeit; buy/bought sell/sold steal/stolen lose/lost rob/robbed mend count weigh borrow hoard
        barter stitch squander; pay/paid beg/begged toil limp haggle prosper starve thrive complain grumble bicker
        bustle""",
    "forest": """oak fox/foxes owl lamb brook path hill meadow acorn nest bee thorn badger shepherd stag bramble flute
        hare hedge wolf/wolves orchard fern branch sparrow willow daisy squirrel mushroom cricket thicket hedgehog; shy
        green gentle mossy leafy tall nimble small dewy ancient furry wandering sunlit twisted honey-sweet evergreen;
        hide/hidden hunt feed/fed climb tame trap/trapped gather plant chop/chopped startle prune nibble shelter;
        grow/grown hum/hummed sleep/slept creep/crept graze ripen doze rustle chirp wither scamper blossom""",
    "grave": """star ghost grave bone moon tomb shadow raven skull worm night bell sorrow prayer tear grief sexton omen
        widow spectre coffin midnight shroud dirge dungeon cobweb vault phantom lullaby nightmare churchyard; dark pale
        dead weary silent lonely hollow mortal ashen mournful ghostly gloomy forsaken moonlit nameless half-forgotten;
        fear bury mourn curse haunt pity slay/slain forget/forgotten dread lament bless summon bewail; die wake/woken
        moan perish lurk vanish groan wail linger brood expire moulder""",
}
RHYMES = """night light sight knight; day way play bay; sea tree key bee; shore door floor core; fire choir lyre mire;
    stone throne bone loan; rain lane plain chain; king spring ring string; bed head bread thread; rose nose prose toes;
    ground hound sound mound; hall wall ball stall; year tear cheer fear; gold fold hold mould; land sand hand band;
    heart cart art dart"""

# SYMBOL = weight alternative | ...   Upper case: a rule; $: a choice or an echo that depends on the stage; #: what was
# asked; /: a new line of the closing couplet; "a" becomes "an" before a vowel.
GRAMMAR = """
OPEN = 4 good morrow , $voc ; what says $third of the $topic ? #WHAT
 | 3 tell me , $voc , hath $third $vtd the $topic ? #HATH
 | 3 welcome , $voc ; I come from $third , and I bring thee the $topic .
 | 2 hark , $voc ! $third hath $vtd the $topic . | 2 what news , $voc ? they say $third hath $vtd the $topic !
 | 2 $voc , I dreamed of $third and of the $topic END
ENTER = 4 how now , $voc ! what $n is this ? #WHICH | 3 I come from PLACE , $sir ; CLAUSE END | 2 make way ! CLAUSE END
 | 2 who speaks of the $same ? CLAUSE END | 1 peace , $voc ! CLAUSE END
A_WHAT = 5 $he says that CLAUSE END | 2 nothing , $sir ; CLAUSE END | 2 enough of $third ! CLAUSE END
A_WHICH = 5 'tis the $n of $third , $sir . | 2 no $n , $sir ; 'tis a $n . | 2 a $n , $sir , that I have $vtd .
A_HATH = 5 ay , $sir , $he hath $done it END | 4 nay , $he hath not $done the $same END
 | 2 I know not if $he hath $done it .
A_WHERE = 5 the $same lies PP END | 3 it lies PP END | 2 I know not , $sir . | 2 ask $third ; CLAUSE END
A_WHERES = 5 the $sames lie PP END | 3 they lie PP END | 2 I know not , $sir . | 2 ask $third ; CLAUSE END
A_WHO = 5 'twas $third that hath $done it END | 3 I have $done the $same , $sir END | 2 none hath $done it , $sir .
 | 3 the $n of $third hath $done it END
A_WILL = 5 ay , I'll $again it TAIL END | 5 nay , I will not $again the $same END | 2 ask me not ; CLAUSE END
A_WHY = 6 because CLAUSE END | 2 wherefore not , $sir ? CLAUSE END | 1 for love , $sir .
S = 60 CLAUSE END | 5 if CLAUSE , CLAUSE END | 4 when CLAUSE , CLAUSE END | 4 as the AS | 6 where WHERE
 | 5 who hath $vtd the AN ? #WHO | 5 why WHY | 5 wilt thou $vt the AN ? #WILL | 4 hath $third $vtd the AN ? #HATH
 | 2 what says $third of the AN ? #WHAT | 6 o $adj O | 7 $cry CRY | 6 let LET | 3 bring me OBJ END | 3 give me OBJ END
 | 2 show me OBJ END | 3 do not BARE END | 3 by my $n , CLAUSE END | 4 good $voc , CLAUSE END | 3 how $adj HOW
 | 3 come , CLAUSE END
AS = 4 $n $vis , so $likewise my $n END | 2 $adj $n $vis , so $likewise my $n END
WHERE = 8 is LOST | 4 are the $ns ? #WHERES
LOST = 6 the AN ? #WHERE | 2 $third ? CLAUSE END
ASKS = 4 $vi | 4 $vt the AN
WHY = 7 dost thou ASKS ? #WHY | 3 doth $he $vi ? #WHY | 3 are the $ns so $adj ? #WHY
O = 6 $n ! | 3 $ns ! | 2 , $adj $n !
CRY = 7 , CRIED | 3 !
CRIED = 5 CLAUSE END | 2 $sir !
LET = 5 us BASIC END | 3 me BASIC END | 3 no $n BASIC END | 2 the ADJN BASIC END | 2 $him BASIC END
HOW = 4 is the $n ! | 3 are the $ns ! | 2 art thou , $voc !
CLAUSE = 18 the SUBJ | 10 my SUBJ | 7 thy SUBJ | 4 $whose SUBJ | 5 a ASUBJ | 18 I FIRST | 12 thou SECOND | 10 $he HEVP
 | 6 $third HEVP | 4 this THIS | 3 no $n SVP | 3 every $n SVP | 3 all ALL | 4 there THERE | 4 'tis TIS | 4 we WE
 | 3 it IT | 7 our SUBJ | 3 these $ns PVP | 3 those $ns PVP | 3 some SOME
SUBJ = 10 NVP | 10 $adj ANVP
ANVP = 8 NVP | 1 , $adj NVP | 2 and $adj NVP
NVP = 6 $n MODS SVP | 4 $ns MODP PVP
MODS = 20 | 3 of the ADJN | 3 that WHICHS
MODP = 20 | 3 of the ADJN | 3 that WHICH
WHICHS = 2 $vts OBJ | 1 $vis
WHICH = 2 $vt OBJ | 1 $vi
ASUBJ = 2 $n SVP | 3 $adj $n SVP
SOME = 3 $ns PVP | 3 $n SVP | 2 $adj $ns PVP
THIS = 3 same $same SVP | 3 $n SVP | 3 $adj $n SVP
ALL = 3 my $ns PVP | 3 the $ns PVP | 2 $ns PVP
THERE = 6 is ONE | 4 are NUM $ns PP
ONE = 4 a AN PP | 2 no $n PP
NUM = 5 two | 4 three | 3 six | 3 ten | 2 nine | 2 forty | 1 too many
TIS = 4 $adj to BARE | 2 not the $n that $vts SOBJ | 3 time to BARE | 1 but a AN
SVP = 14 $vts SOBJ TAIL | 11 $vis TAIL | 7 hath DONE | 9 is BE | 5 will BASE | 3 doth not BARE | 4 shall BASE
 | 3 must BARE | 3 may BASE | 3 would BASE | 2 can BARE | 3 was BE
PVP = 14 $vt SOBJ TAIL | 11 $vi TAIL | 7 have DONE | 9 are BE | 5 will BASE | 3 do not BARE | 4 shall BASE
 | 3 must BARE | 3 may BASE | 3 would BASE | 2 can BARE | 3 were BE
WE = 5 $vt OBJ TAIL | 4 $vi TAIL | 3 have DONE | 3 are BE | 3 will BASE | 2 must BARE | 1 know that CLAUSE
IT = 4 rains TAIL | 2 snows TAIL | 3 grows late | 2 is $adj TAIL | 1 was not I
HEVP = 20 SVP | 2 says that CLAUSE | 1 swears that CLAUSE
FIRST = 12 $vt MYOBJ TAIL | 9 $vi TAIL | 8 have DONE | 8 am BE | 6 will BASE | 4 do not BARE | 2 would BASE
 | 2 must BARE | 2 cannot BARE | 2 think that CLAUSE | 2 swear by my $n that CLAUSE | 1 hear that CLAUSE
SECOND = 6 dost TBARE | 4 hast TDONE | 6 art BE | 5 shalt TBASE | 3 canst not TBARE
BARE = 5 $vt MYOBJ TAIL | 4 $vi TAIL
BASE = 9 BARE | 2 be $adj | 2 not BARE | 1 ne'er BARE
BASIC = 5 $vt OBJ TAIL | 4 $vi TAIL
TBARE = 5 $vt THYOBJ TAIL | 4 $vi TAIL
TBASE = 9 TBARE | 2 be $adj | 2 not TBARE
DONE = 6 $vtd MYOBJ TAIL | 4 $vid TAIL | 2 not $vtd OBJ TAIL | 1 ne'er $vid TAIL
TDONE = 6 $vtd THYOBJ TAIL | 4 $vid TAIL | 2 not $vtd THYOBJ TAIL
BE = 9 $adj TAIL | 3 not $adj | 2 more $adj than OBJ | 2 as $adj as OBJ | 2 PP | 1 gone to PLACE
OBJ = 12 the ADJN | 7 my ADJN | 6 thy ADJN | 4 $his ADJN | 2 $whose ADJN | 7 a AN | 3 this same $same | 2 every $n
 | 3 no $n | 6 our ADJN | 3 some ADJN | 2 NUM $ns | 2 each $n | 2 these $ns | 2 those $ns
SOBJ = 9 OBJ | 2 me | 2 thee
MYOBJ = 11 OBJ | 2 thee
THYOBJ = 11 OBJ | 2 me
ADJN = 10 NN | 11 $adj ADJNN
ADJNN = 9 NN | 1 , $adj NN | 2 and $adj NN
NN = 6 $n | 4 $ns
AN = 4 $n | 5 $adj $n
TAIL = 15 | 9 PP | 4 ADV | 2 like a AN | 1 with $him | 1 for PRICE
PRICE = 3 love | 2 shame | 2 nothing | 1 ever
PP = 8 in PLACE | 5 on PLACE | 5 by PLACE | 4 upon PLACE | 4 near PLACE | 4 under PLACE | 3 o'er PLACE | 3 past PLACE
 | 2 without PLACE | 2 beneath PLACE | 2 among the $ns | 1 behind PLACE
PLACE = 9 the ADJN | 3 my ADJN | 2 thy ADJN | 4 a AN | 3 $his ADJN | 3 our ADJN | 1 $whose ADJN
ADV = 4 tonight | 4 again | 3 alone | 2 today | 2 too | 2 e'en now | 1 forever | 1 once more
END = 22 . | 8 ! | 6 ; CLAUSE END | 3 : CLAUSE END | 15 , MORE
MORE = 7 and CLAUSE END | 6 but CLAUSE END | 5 for CLAUSE END | 3 yet CLAUSE END | 2 so CLAUSE END | 2 till CLAUSE END
 | 5 $voc STOP | 2 good $voc STOP | 5 $sir STOP
STOP = 4 . | 2 !
CLOSE = 4 / farewell ; ADIEU | 3 / away ; ADIEU | 2 / enough ; ADIEU
ADIEU = 4 the ADIEUN CALLS the $rhyme , / COUPLET | 2 our $ns CALL the $rhyme , / COUPLET
CALLS = 3 calls us to | 2 waits beside | 2 hurries to | 1 cries for
CALL = 3 call us to | 2 wait beside | 2 hurry to | 1 cry for
ADIEUN = 2 $n | 1 $adj $n
COUPLET = 7 and ALLIES SHALL the $chime . | 2 till every $n SHALL the $chime .
ALLIES = 4 all our $ns | 3 gentle $voc
SHALL = 6 shall REST | 4 must GO
REST = 3 sleep beside | 3 praise | 1 greet
GO = 2 wander to | 2 leave | 1 bow to
"""
# Kind of word: its column in TOPICS, its form, and the echoes for later words, each with its form.
KINDS = {
    "$n": (0, 0, {"$same": 0}), "$ns": (0, 1, {"$sames": 1}), "$adj": (1, 0, {}),
    "$vt": (2, 0, {"$again": 0, "$done": 2}), "$vts": (2, 1, {"$again": 0, "$done": 2}),
    "$vtd": (2, 2, {"$again": 0, "$done": 2}), "$vi": (3, 0, {}), "$vis": (3, 1, {"$likewise": 1}), "$vid": (3, 2, {}),
}  # fmt: skip
MARKS, SPEECH_ENDS = frozenset(".,;:!?"), "\n\n"

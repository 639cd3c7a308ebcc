"""The worlds the questions are about: one line a table.

``entity; name column (pool); category column = values; number column low-high; ...``, in the order of the table.
"""

from __future__ import annotations

TRAIN = """
player; name person; team = Reds Blues Hawks Lions; goals 0-40; age 17-39
book; title work; genre = crime poetry fantasy history; pages 80-900; year 1950-2024
city; name place; country = France Spain Peru Kenya; population 20000-900000; founded 900-1900
employee; name person; department = sales research legal support; salary 28000-99000; age 20-64
film; title work; director = Costa Meyer Tanaka Silva; rating 1-10; year 1960-2024
dog; name pet; breed = beagle poodle boxer collie; weight 4-60; age 1-15
car; model thing; maker = Volta Nordic Apex Solano; price 9000-90000; horsepower 60-400
student; name person; major = biology physics music law; credits 0-180; year 1-6
recipe; title work; cuisine = Thai Greek Indian Cuban; minutes 5-180; calories 100-1500
flight; code code; airline = Skyjet Aero Polar Delta; distance 200-9000; seats 40-400
mountain; name place; range = Andes Alps Rockies Atlas; height 800-8000; deaths 0-90
song; title work; artist = Nova Kestrel Juno Marlow; plays 100-90000; seconds 90-500
hotel; name place; city = Oslo Lima Cairo Kyoto; stars 1-5; rooms 8-600
patient; name person; ward = east west north south; age 1-99; weight 10-140
painting; title work; painter = Ferro Lund Okafor Reyes; price 500-99000; year 1600-2020
ship; name thing; flag = Malta Panama Norway Japan; length 20-400; crew 3-1200
bridge; name place; material = steel stone wood concrete; length 30-3000; opened 1500-2020
teacher; name person; subject = maths art chemistry Latin; salary 24000-70000; experience 0-40
wine; name thing; region = Rioja Mosel Napa Douro; price 5-400; vintage 1980-2023
phone; model thing; brand = Orbit Lumen Pixelon Zeta; price 90-1500; battery 2000-6000
horse; name pet; stable = Hill River Oak Meadow; wins 0-50; age 2-25
game; title work; studio = Redbit Owlsoft Nimbus Kraken; sales 1000-900000; score 1-100
river; name place; continent = Asia Africa Europe Oceania; length 50-6500; depth 1-200
tree; species thing; park = Central Royal Lakeside Castle; height 2-90; age 5-900
museum; name place; type = art science war railway; visitors 500-900000; opened 1800-2020
doctor; name person; specialty = heart bones skin eyes; patients 10-900; experience 1-45
tablet; model thing; color = black white gold blue; price 80-1400; storage 16-512
concert; title work; venue = Arena Palace Dome Garden; tickets 50-20000; price 10-300
planet; name place; system = Vega Altair Rigel Deneb; moons 0-80; radius 1000-70000
soldier; name person; rank = private sergeant captain major; missions 0-60; age 18-55
cheese; name thing; milk = cow goat sheep buffalo; price 3-60; fat 5-60
bus; line code; depot = North Harbour Mill Airport; stops 4-60; passengers 10-900
lawyer; name person; firm = Grant Baxter Holm Pierce; cases 1-300; fee 80-900
island; name place; ocean = Pacific Atlantic Indian Arctic; area 1-9000; population 0-90000
laptop; model thing; brand = Kite Argon Tundra Mosaic; price 300-3500; weight 1-5
farmer; name person; crop = wheat rice maize barley; acres 2-900; cows 0-300
poem; title work; poet = Ashe Lindqvist Moreau Tran; lines 4-400; year 1700-2024
train; name code; operator = Rapid Metro Coastal Union; speed 60-350; cars 2-20
castle; name place; style = gothic baroque norman moorish; towers 1-14; built 900-1800
swimmer; name person; club = Dolphins Sharks Otters Orcas; medals 0-30; age 12-40
perfume; name thing; house = Belle Fleur Musc Ombre; price 20-400; volume 10-200
bakery; name place; district = Old Harbour Garden Station; loaves 20-900; staff 1-30
comet; name thing; observer = Halder Encke Brooks Swift; period 3-900; magnitude 1-15
chef; name person; restaurant = Olive Truffle Saffron Basil; stars 0-3; age 20-70
sofa; model thing; fabric = velvet linen leather wool; price 150-4000; width 90-320
podcast; title work; host = Amara Felix Greta Hugo; episodes 1-900; listeners 50-90000
lake; name place; state = Ohio Texas Maine Utah; depth 2-600; area 1-900
nurse; name person; shift = day night weekend evening; salary 22000-60000; patients 1-40
bike; model thing; type = road mountain city folding; price 150-8000; gears 1-30
senator; name person; party = Green Labour Liberal Union; votes 900-90000; age 30-85
battery; model code; chemistry = lithium nickel lead zinc; capacity 100-9000; price 2-300
opera; title work; composer = Bellor Strand Vitale Koch; acts 1-5; premiere 1700-2000
zebra; name pet; herd = river valley ridge plain; weight 150-400; age 1-25
parcel; code code; status = sent lost delivered waiting; weight 1-40; cost 3-90
runner; name person; country = Kenya Japan Brazil Norway; races 1-120; age 16-50
carpet; name thing; origin = Persia Turkey Morocco Nepal; price 90-9000; length 1-9
newspaper; title work; language = English German Arabic Hindi; readers 900-900000; founded 1750-2010
witness; name person; town = Ashby Dover Luton Ripley; age 18-90; statements 1-12
satellite; name thing; agency = ESA NASA JAXA ISRO; mass 10-9000; launched 1965-2024
pizza; name thing; crust = thin thick stuffed sourdough; price 6-30; calories 400-2000
violin; maker thing; wood = maple spruce ebony willow; price 300-90000; year 1680-2020
camera; model thing; mount = Alpha Zed Omega Kappa; price 200-7000; megapixels 8-100
tenant; name person; building = Maple Cedar Birch Willow; rent 300-3000; rooms 1-7
stadium; name place; sport = football rugby cricket tennis; capacity 2000-90000; opened 1890-2020
"""

VALID = """
pilot; name person; base = Rome Dubai Perth Quito; hours 50-9000; age 22-64
novel; title work; publisher = Harbor Lantern Quill Summit; copies 500-900000; chapters 5-90
cat; name pet; coat = tabby black ginger grey; kittens 0-12; age 1-19
tower; name place; architect = Ito Nilsen Duarte Kovac; floors 3-160; height 20-800
actor; name person; agency = Star Crown Vista Prism; roles 1-150; awards 0-20
tent; model thing; season = spring summer winter autumn; price 40-900; weight 1-15
village; name place; county = Kerry Mayo Clare Sligo; houses 10-900; residents 30-4000
drone; model code; use = racing mapping rescue filming; range 1-90; price 100-9000
tutor; name person; language = Polish Korean Swahili Danish; rate 10-120; pupils 1-40
garden; name place; plant = rose tulip orchid fern; area 20-9000; benches 0-60
sculpture; title work; material = marble bronze clay glass; height 10-500; price 200-90000
cyclist; name person; squad = Falcon Comet Bolt Rocket; wins 0-60; age 18-41
printer; model code; kind = laser inkjet thermal photo; price 50-2000; speed 5-90
theater; name place; town = Bath York Leeds Truro; seats 60-3000; plays 1-60
goat; name pet; farm = Brook Cliff Dale Heath; milk 1-9; age 1-14
"""

TEST = """
sailor; name person; harbor = Split Porto Bergen Gdansk; voyages 1-90; age 17-68
magazine; title work; topic = travel cooking fashion science; issues 1-600; price 2-20
rabbit; name pet; hutch = Clover Barn Orchard Shed; weight 1-8; age 1-11
volcano; name place; nation = Chile Iceland Italy Japan; eruptions 1-70; height 300-6500
scientist; name person; field = optics genetics geology robotics; papers 1-400; citations 0-90000
guitar; model thing; color = red sunburst black cream; price 100-6000; frets 19-24
school; name place; borough = Camden Bexley Sutton Barnet; pupils 50-2500; teachers 4-180
rocket; name code; company = Zenith Vulcan Photon Boreal; thrust 100-9000; launches 1-200
barber; name person; shop = Razor Comb Mirror Fade; clients 5-400; tips 10-900
forest; name place; climate = boreal tropical alpine coastal; hectares 10-90000; trails 0-50
musical; title work; writer = Dorsey Halloran Pike Vance; songs 6-40; shows 10-9000
boxer; name person; gym = Iron Anvil Hammer Forge; fights 1-80; knockouts 0-50
watch; model code; strap = leather steel rubber canvas; price 30-9000; jewels 7-40
market; name place; day = Monday Friday Saturday Sunday; stalls 5-300; visitors 50-9000
parrot; name pet; cage = attic lobby porch studio; words 0-150; age 1-60
"""

PEOPLE = (
    "Adam Alice Amir Anna Anton Bella Boris Carla Carmen Cedric Clara Dalia Daniel Diego Dora Edgar Elena Emil Erik "
    "Esther Fatima Fiona Frank Gabriel Georg Grace Hanna Harold Helen Hugo Ida Igor Ines Isaac Ivan Jana Jasper Joan "
    "Jonas Julia Kamal Karen Karl Kira Lara Leo Liam Lina Lucas Maria Mark Mehmet Mina Nadia Nina Noah Olga Omar Oscar "
    "Paula Pedro Petra Quinn Rahul Rita Robin Rosa Ruth Sam Sara Selma Simon Sofia Stella Tariq Tessa Thomas Uma Vera "
    "Victor Wanda Will Xavier Yara Yusuf Zoe"
).split()
PETS = (
    "Archie Bandit Biscuit Bruno Caramel Cleo Coco Dusty Echo Felix Ginger Hazel Honey Jasper Jolly Kiki Lady Loki "
    "Lulu Maple Milo Misty Mocha Nala Olive Otis Pepper Pippin Poppy Rex Rocky Ruby Rusty Sage Scout Shadow Smokey "
    "Socks Storm Sunny Teddy Tiger Toby Willow Ziggy"
).split()
PLACES = (
    "Alden Aston Belmont Bramley Calder Camber Corvo Danton Delmar Dunmore Elden Elmira Farrow Fenwick Galen Glenora "
    "Halden Harrow Iverna Jarrow Kelso Kirkby Lanark Lindale Lorne Marlin Melrose Merida Norwood Oakham Orford Padova "
    "Penrose Ravenna Redfern Rosario Salta Selby Sidra Tamar Tarbert Thornby Ulverton Valmor Verdon Walden Wexham "
    "Yarrow Zamora"
).split()
THINGS = (
    "Amber Arrow Atlas Aurora Breeze Cobalt Copper Coral Crystal Dawn Drift Ember Falcon Flint Frost Glacier Granite "
    "Harvest Horizon Indigo Jade Jasper Juniper Lark Lotus Lunar Magma Meteor Midnight Mirage Mosaic Nebula Onyx Opal "
    "Orchid Pearl Phoenix Quartz Raven Ridge Saffron Sierra Spark Summit Thunder Topaz Vector Velvet Violet Zephyr"
).split()
FIRST_WORDS = "Silent Golden Broken Hidden Distant Endless Winter Paper Burning Crimson Lonely Secret Last Blue".split()
LAST_WORDS = "River Garden Letters Stars Winds Harbour Mirror Road Island Night Forest Voices Dream Bells Song".split()

SUPERLATIVES = {
    "age": ("oldest", "youngest"),
    "price": ("most expensive", "cheapest"),
    "height": ("tallest", "shortest"),
    "length": ("longest", "shortest"),
    "weight": ("heaviest", "lightest"),
    "salary": ("best paid", "worst paid"),
    "depth": ("deepest", "shallowest"),
    "speed": ("fastest", "slowest"),
    "area": ("largest", "smallest"),
    "population": ("most populous", "least populous"),
}
"""Adjectives for the largest and smallest value of a column; other columns say "the highest X" and "the lowest X"."""

#!/bin/sh
# Write a repository's name into every badge and setup cell: sh .github/rename.sh you/yours
set -eu
case ${1-} in
    */*) ;;
    *) echo "'${1-}' is no OWNER/REPO: sh .github/rename.sh you/yours" >&2; exit 1 ;;
esac
name='[\w.-]+\/[\w.-]+?(?=\/blob\/|(\.git)?\\?")'
badge='colab\.research\.google\.com\/github\/'
setup='REPOSITORY = \\"https:\/\/github\.com\/' # with a notebook file's quotes
cited='repository-code: "https:\/\/github\.com\/'
export NEW="$1"
# The README's badges lead to a page of ours until there is a name
row='(\]\((\S+\.ipynb)\).*\]\()docs\/settings\.md#on-colab'
git ls-files -z -- README.md CITATION.cff '*.ipynb' |
    xargs -0 perl -pi -e "s/($badge|$setup|$cited)$name/\$1\$ENV{NEW}/g;
        s/$row/\$1https:\/\/colab.research.google.com\/github\/\$ENV{NEW}\/blob\/main\/\$2/"

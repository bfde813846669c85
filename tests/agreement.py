"""See `seqzoo.testing`."""

from seqzoo.testing import assert_close as assert_close

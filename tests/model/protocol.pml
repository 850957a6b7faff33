/* The protocol of commits and garbage collection, small enough to look at every order of its steps.
 *
 * One step is one request that the store answers. A process that is stopped for ever, or wakes
 * much later, needs nothing of its own here: any process may pause anywhere, and collectors may
 * fence any session and take over from any collector at any time, as though their clocks had run
 * out. So nothing rests on clocks but this: the roots of a fenced session are kept for as long as
 * its writer may still wake, and the store itself refuses a deletion whose collector was replaced.
 * A read and a compare-and-swap that succeeds are one step: nothing has changed in between.
 *
 * A tree stands for a snapshot, its manifest and its locations, and the locations name one pack:
 * the pack that holds what the tree consists of, which several packs may do (so a writer chooses
 * whether to reuse one, to write its own, or to write pack 0 again under the same name).
 *
 * MUTATION=... leaves a rule out; each must then be found to lose something.
 */

#define NONE 0
/* Rules of the plan, each left out in one mutation. */
#define AGE_ONLY 1          /* what one mark finds dead and is old is deleted */
#define NO_FRESH_MARK 2     /* the sweep goes by the mark that condemned */
#define MARK_FIRST 3        /* the mark comes before the sessions are listed */
#define NO_CLAIM 4          /* what is doomed is written anew without taking it off the list */
#define LATE_SESSION 5      /* a session is made when there is something to commit */
#define NO_REREAD 6         /* the state is not read again once the session is there */
#define NO_DECLARE 7        /* the ref is moved without having declared the snapshot */
#define NO_EPOCHS 8         /* the sweep does not look at the epochs of sessions */
#define NO_CAS 9            /* what is deleted is not taken from the list by compare-and-swap */
#define REUSE_DOOMED 10     /* writers rely on what is condemned */
#define FENCE_DROPS 11      /* what a fenced session has declared is no root any more */
#define BLIND_LOCATIONS 12  /* locations that are there are overwritten */
#define UNDECLARED_PACKS 13 /* locations are replaced without having declared their packs */
#define LATE_DELETE 14      /* a deletion may land after another collector has taken over */
#define END_UNCLEAR 15      /* the session ends though nobody knows whether the ref has moved */
#define UNSEEN 16           /* a tag does not look whether everything is there */
#define NO_TAKEOVER 17      /* nobody takes over from a collector that died */
#define NO_FENCE 18         /* nobody fences a session that is left */
#define UNCLAIMED_PACKS 19  /* the packs of new locations stay condemned */
#define NO_RECHECK 20       /* what was declared is not looked at again */

/* The one to try, and the scene, are environment variables: one compilation serves all of them. */
c_decl { \#include <stdlib.h>
};
hidden byte mutation;
hidden byte scene;
#define WITHOUT(rule) (mutation == rule)

#define PACKS 3
#define TREES 2
#define KEYS 5
#define REFS 2
#define WRITERS 3
#define BIT(k) (1 << (k))
#define TREE(m) (PACKS + (m))
#define OLD (BIT(0) | BIT(TREE(0))) /* what was there long before */

/* The object store: which keys there are, what locations name, refs (0: none, else tree + 1). */
byte there;
byte loc[TREES];
byte ref[REFS];
byte version[REFS];

/* gc/state */
byte epoch;
byte condemned;
byte since[KEYS];
byte deleting;
byte owner;

/* sessions/ */
#define GONE 0
#define OPEN 1
#define FENCED 2
byte session[WRITERS];
byte began[WRITERS];
byte roots[WRITERS];
byte kept[WRITERS];

bool stopped; /* by the auditor: nobody does anything any more */

#define HAS(mask, k) (((mask) & BIT(k)) != 0)
#define READABLE(m) (HAS(there, TREE(m)) && HAS(there, loc[m]))
#define SOUND(r) (ref[r] == 0 || (HAS(there, PACKS + ref[r] - 1) && HAS(there, loc[ref[r] - 1])))
#define FOLLOWED(m) (READABLE(m) || (!HAS(roots[0], m) && !HAS(roots[1], m) && !HAS(roots[2], m)))
/* Whatever a ref names is there, and so is what a session has declared. */
#define CHECK() assert(SOUND(0) && SOUND(1) && FOLLOWED(0) && FOLLOWED(1))

/* ---- writers ---- */

inline read_state() {
    seen = epoch; doomed = condemned | deleting;
}

inline begin(w) {
    atomic { read_state() };
    if
    :: WITHOUT(LATE_SESSION)
    :: else ->
        atomic { session[w] = OPEN; began[w] = seen };
        if
        :: WITHOUT(NO_REREAD)
        :: else ->
            do
            :: atomic { epoch == seen -> read_state(); break }
            :: atomic { epoch != seen -> read_state() };
                atomic { if :: session[w] == OPEN -> began[w] = seen :: else -> goto lost fi }
            od
        fi
    fi;
    if :: WITHOUT(REUSE_DOOMED) -> doomed = 0 :: else fi
}

inline late_session(w) {
    if
    :: WITHOUT(LATE_SESSION) -> atomic { session[w] = OPEN; began[w] = seen }
    :: else
    fi
}

/* Take a key off the list; whoever is deleting it is waited for. */
inline claim(k) {
    if
    :: WITHOUT(NO_CLAIM)
    :: !WITHOUT(NO_CLAIM) -> atomic { !HAS(deleting, k) -> condemned = condemned & ~BIT(k) }
    fi;
    doomed = doomed & ~BIT(k)
}

inline put(k) {
    if :: HAS(doomed, k) -> claim(k) :: else fi;
    there = there | BIT(k)
}

inline declare(w, m) {
    atomic {
        if
        :: session[w] != OPEN -> goto lost
        :: else -> if :: WITHOUT(NO_DECLARE) :: else -> roots[w] = roots[w] | BIT(m) fi
        fi
    }
}

/* Before locations are replaced their pack is declared... */
inline keep(w, p) {
    if
    :: WITHOUT(UNDECLARED_PACKS)
    :: else -> atomic { if :: session[w] != OPEN -> goto lost :: else -> kept[w] = kept[w] | BIT(p) fi }
    fi
}

/* ...and behind that it is taken off the list, as others rely on the tree it now belongs to. */
inline settle(p) {
    if
    :: WITHOUT(UNCLAIMED_PACKS)
    :: else -> atomic { condemned = condemned & ~BIT(p) }
    fi
}

inline end(w) {
    d_step { session[w] = GONE; began[w] = 0; roots[w] = 0; kept[w] = 0; doomed = 0; seen = 0; pack = 0; was = 0; at = 0 }
}

/* The tree is stored: what is there and good stays, what is not is replaced by compare-and-swap. */
inline put_tree(w, m) {
    if :: HAS(doomed, TREE(m)) -> claim(TREE(m)) :: else fi;
    do
    :: atomic { !HAS(there, TREE(m)) };
        atomic { if :: !HAS(there, TREE(m)) -> there = there | BIT(TREE(m)); loc[m] = pack; break :: else fi }
    :: atomic { HAS(there, TREE(m)) -> was = loc[m] };
        if
        :: WITHOUT(BLIND_LOCATIONS) ->
            atomic { there = there | BIT(TREE(m)); loc[m] = pack; CHECK(); break }
        :: else ->
            if
            :: atomic { !HAS(doomed, was) && HAS(there, was) -> break }
            :: atomic { HAS(doomed, was) || !HAS(there, was) };
                keep(w, pack);
                atomic {
                    if
                    :: HAS(there, TREE(m)) && loc[m] == was -> loc[m] = pack; CHECK()
                    :: else -> goto next
                    fi
                };
                settle(pack);
                break;
next:
                skip
            fi
        fi
    od;
    was = 0
}

/* Once declared: is any of it, as it is stored by now, being deleted? */
inline recheck(m) {
    if :: WITHOUT(NO_RECHECK) -> goto fine :: else fi;
    atomic { at = loc[m] };
    atomic {
        if
        :: HAS(deleting, TREE(m)) || HAS(deleting, at) -> goto lost
        :: else -> if :: WITHOUT(NO_CLAIM) :: else -> condemned = condemned & ~(BIT(TREE(m)) | BIT(at)) fi
        fi
    };
    atomic { if :: !HAS(there, TREE(m)) || !HAS(there, at) -> goto lost :: else fi }
}

inline move(r, m) {
    atomic { if :: version[r] == at -> ref[r] = m + 1; version[r]++; CHECK() :: else fi }
}

proctype Pusher(byte w, m, r, own) {
    byte seen, doomed, pack, was, at, expected;
    bit unclear;
    begin(w);
    expected = version[r];
    if
    :: atomic { HAS(there, 0) && !HAS(doomed, 0) -> pack = 0 }
    :: atomic { HAS(there, own) && !HAS(doomed, own) -> pack = own }
    :: pack = own; put(own)
    :: pack = 0; put(0)
    fi;
    put_tree(w, m);
    late_session(w);
    declare(w, m);
    recheck(m);
fine:
    at = expected;
    if
    :: true
    :: unclear = 1; /* told of a time-out, and the answer may yet be anything */
        if :: WITHOUT(END_UNCLEAR) -> end(w); at = expected :: else fi
    fi;
    move(r, m);
    if :: unclear -> goto lost :: else fi;
    end(w);
lost:
    skip
}

/* A new ref for what another one names, which is then removed. */
proctype Tagger(byte w, m, r, old) {
    byte seen, doomed, pack, was, at, expected;
    begin(w);
    expected = version[r];
    if
    :: WITHOUT(UNSEEN)
    :: else ->
        atomic { if :: HAS(there, TREE(m)) -> at = loc[m] :: else -> goto refused fi };
        atomic {
            if
            :: HAS(deleting, TREE(m)) || HAS(deleting, at) -> goto refused
            :: else -> if :: WITHOUT(NO_CLAIM) :: else -> condemned = condemned & ~(BIT(TREE(m)) | BIT(at)) fi
            fi
        };
        atomic { if :: !HAS(there, TREE(m)) || !HAS(there, at) -> goto refused :: else fi }
    fi;
    late_session(w);
    declare(w, m);
    at = expected;
    move(r, m);
    end(w);
    atomic { ref[old] = 0; version[old]++ };
    goto lost;
refused:
    end(w);
lost:
    skip
}

/* Stores what a tree consists of once more and lets its locations lead there. */
proctype Repacker(byte w, m, own) {
    byte seen, doomed, pack, was, at;
    begin(w);
    atomic { if :: HAS(there, TREE(m)) -> was = loc[m] :: else -> goto done fi };
    if
    :: atomic { HAS(doomed, TREE(m)) -> goto done }
    :: atomic { else -> pack = own }
    fi;
    put(own);
    late_session(w);
    keep(w, own);
    atomic { if :: HAS(there, TREE(m)) && loc[m] == was -> loc[m] = own; CHECK() :: else -> goto done fi };
    settle(own);
done:
    end(w);
lost:
    skip
}

proctype Remover(byte r) {
    atomic { ref[r] = 0; version[r]++ }
}

/* ---- collectors ---- */

inline drop(k) {
    there = there & ~BIT(k);
    if
    :: k >= PACKS -> loc[k - PACKS] = 0
    :: else
    fi;
    CHECK()
}

inline delete_all(c) {
    k = KEYS;
    do
    :: k == 0 -> break
    :: else ->
        k--;
        if
        :: !HAS(deleting, k)
        :: else ->
            if
            :: WITHOUT(LATE_DELETE) ->
                atomic { if :: owner != c -> goto replaced :: else fi };
                atomic { drop(k) }
            :: else -> atomic { if :: owner != c -> goto replaced :: else -> drop(k) fi }
            fi
        fi
    od;
    atomic { if :: owner != c -> goto replaced :: else -> deleting = 0 fi }
}

inline list_sessions() {
    least = 255; found = 0; packs = 0; k = 0;
    do
    :: k == WRITERS -> k = 0; break
    :: else ->
        atomic {
            if
            :: session[k] == OPEN ->
                if
                :: least > began[k] -> least = began[k]
                :: else
                fi;
                found = found | roots[k]; packs = packs | kept[k]
            :: session[k] == OPEN && !WITHOUT(NO_FENCE) -> fence(k)
            :: session[k] == FENCED -> found = found | roots[k]; packs = packs | kept[k]
            :: session[k] == GONE
            fi;
            k++
        }
    od
}

inline fence(w) {
    if
    :: WITHOUT(FENCE_DROPS) || (roots[w] == 0 && kept[w] == 0) -> session[w] = GONE; began[w] = 0; roots[w] = 0; kept[w] = 0
    :: else -> session[w] = FENCED; began[w] = 0; found = found | roots[w]; packs = packs | kept[w]
    fi
}

/* The refs one by one, and only then where the trees lie. */
inline mark(c) {
    live = packs; k = 0;
    do
    :: k == REFS -> k = 0; break
    :: else -> atomic { if :: ref[k] != 0 -> found = found | BIT(ref[k] - 1) :: else fi; k++ }
    od;
    do
    :: k == TREES -> k = 0; break
    :: else ->
        atomic {
            if
            :: HAS(found, k) ->
                if
                :: HAS(there, TREE(k)) -> live = live | BIT(TREE(k)) | BIT(loc[k])
                :: else -> goto over /* a root that cannot be followed: nothing is swept */
                fi
            :: else
            fi;
            k++
        }
    od;
    found = 0; packs = 0
}

/* What is dead for good goes from the list to what is deleted; what is newly dead comes on it. */
inline decide(c, sweep) {
    atomic {
        if
        :: owner != c -> goto replaced
        :: else ->
            condemned = condemned & ~live; k = 0;
            do
            :: k == KEYS -> k = 0; break
            :: else ->
                if
                :: HAS(condemned, k) && sweep && (since[k] <= least || WITHOUT(NO_EPOCHS)) ->
                    deleting = deleting | BIT(k); condemned = condemned & ~BIT(k); since[k] = 0
                :: WITHOUT(AGE_ONLY) && HAS(there & ~live & OLD, k) -> deleting = deleting | BIT(k)
                :: else
                fi;
                if
                :: HAS(there & ~live & ~condemned & ~deleting, k) ->
                    condemned = condemned | BIT(k); since[k] = epoch + 1; fresh = 1
                :: else -> if :: !HAS(condemned, k) -> since[k] = 0 :: else fi
                fi;
                k++
            od;
            epoch = epoch + fresh; fresh = 0
        fi
    }
}

/* For a mutation: what to delete was chosen when the sessions were listed, whoever claims it. */
inline choose() {
    atomic {
        chosen = 0; k = 0;
        do
        :: k == KEYS -> k = 0; break
        :: else -> if :: HAS(condemned, k) && since[k] <= least -> chosen = chosen | BIT(k) :: else fi; k++
        od
    }
}

proctype Collector(byte c, rounds) {
    byte k, least, found, packs, live, chosen, round;
    bit fresh;
    if
    :: atomic { owner == 0 -> owner = c }
    :: atomic { owner != 0 && owner != c && !WITHOUT(NO_TAKEOVER) -> owner = c }
    fi;
    if :: atomic { deleting != 0 -> skip }; delete_all(c) :: else fi;
    do
    :: round == rounds -> break
    :: else ->
        round++;
        if
        :: WITHOUT(NO_FRESH_MARK) && round > 1 -> list_sessions()
        :: WITHOUT(MARK_FIRST) ->
            found = 0; packs = 0;
            mark(c);
            list_sessions();
            found = 0; packs = 0
        :: else ->
            list_sessions();
            if :: WITHOUT(NO_CAS) -> choose() :: else fi;
            mark(c)
        fi;
        if
        :: WITHOUT(NO_CAS) -> atomic { deleting = chosen & ~live; chosen = 0 }; decide(c, 0)
        :: else -> decide(c, 1)
        fi;
        live = 0; least = 0;
        delete_all(c)
    od;
over:
    atomic { if :: owner == c -> owner = 0 :: else fi };
replaced:
    skip
}

/* ---- whatever happened, quiet runs of a collector leave nothing but what is live ---- */

inline needed() {
    live = 0; k = 0;
    do
    :: k == REFS -> k = 0; break
    :: else -> if :: ref[k] != 0 -> live = live | BIT(PACKS + ref[k] - 1) | BIT(loc[ref[k] - 1]) :: else fi; k++
    od;
    do
    :: k == WRITERS -> k = 0; break
    :: else ->
        if
        :: session[k] != GONE ->
            live = live | kept[k];
            if :: HAS(roots[k], 0) -> live = live | BIT(TREE(0)) | BIT(loc[0]) :: else fi;
            if :: HAS(roots[k], 1) -> live = live | BIT(TREE(1)) | BIT(loc[1]) :: else fi
        :: else
        fi;
        k++
    od
}

inline quiet() {
    there = there & ~deleting; deleting = 0; k = 0; least = 255;
    do
    :: k == WRITERS -> k = 0; break
    :: else ->
        if
        :: session[k] == OPEN && !WITHOUT(NO_FENCE) -> if :: roots[k] == 0 && kept[k] == 0 -> session[k] = GONE :: else -> session[k] = FENCED fi
        :: session[k] == OPEN && WITHOUT(NO_FENCE) -> if :: least > began[k] -> least = began[k] :: else fi
        :: else
        fi;
        k++
    od;
    needed();
    condemned = condemned & ~live;
    do
    :: k == KEYS -> k = 0; break
    :: else -> if :: HAS(condemned, k) && since[k] <= least -> there = there & ~BIT(k); condemned = condemned & ~BIT(k) :: else fi; k++
    od;
    do
    :: k == KEYS -> k = 0; break
    :: else -> if :: HAS(there & ~live & ~condemned, k) -> condemned = condemned | BIT(k); since[k] = epoch + 1 :: else fi; k++
    od;
    epoch++
}

proctype Auditor() {
    byte k, live, least;
    atomic {
        stopped = 1;
        if :: WITHOUT(NO_TAKEOVER) && owner != 0 :: else -> quiet(); quiet() fi;
        CHECK();
        needed();
        assert(there == live);
        /* Seven days later. */
        session[0] = GONE; session[1] = GONE; session[2] = GONE;
        roots[0] = 0; roots[1] = 0; roots[2] = 0; kept[0] = 0; kept[1] = 0; kept[2] = 0;
        if :: WITHOUT(NO_TAKEOVER) && owner != 0 :: else -> quiet(); quiet() fi;
        CHECK();
        needed();
        assert(there == live)
    }
}

/* Nothing is of interest behind the auditor. */
never { do :: !stopped od }

init {
    atomic {
        c_code {
            mutation = getenv("MUTATION") ? atoi(getenv("MUTATION")) : 0;
            scene = getenv("SCENE") ? atoi(getenv("SCENE")) : 1;
        };
        /* Tree 0 is named by ref 0 and lies in pack 0. */
        there = BIT(0) | BIT(TREE(0)); loc[0] = 0; ref[0] = 1;
        run Auditor();
        if
        :: scene == 1 -> /* dedup against what is just unreferenced, and the same names again */
            run Remover(0); run Pusher(0, 0, 1, 1); run Collector(1, 3)
        :: scene == 2 -> /* two writers of one tree, which nothing names any more */
            ref[0] = 0; run Pusher(0, 0, 1, 1); run Pusher(1, 0, 1, 2); run Collector(1, 2)
        :: scene == 3 -> /* two writers of different trees, that share what they consist of */
            ref[0] = 0; run Pusher(0, 0, 0, 1); run Pusher(1, 1, 1, 2); run Collector(1, 2)
        :: scene == 4 -> /* a tag of what a ref names that is renamed away, and a push beside it */
            run Tagger(0, 0, 1, 0); run Pusher(1, 1, 0, 1); run Collector(1, 2)
        :: scene == 5 -> /* the tag moves on and back */
            run Tagger(0, 0, 1, 0); run Tagger(1, 0, 0, 1); run Collector(1, 3)
        :: scene == 6 -> /* two collectors, one of which dies or wakes late */
            ref[0] = 0; run Pusher(0, 0, 1, 1); run Collector(1, 2); run Collector(2, 1)
        :: scene == 7 -> /* a repack beside a tag of the same tree */
            run Repacker(0, 0, 1); run Tagger(1, 0, 1, 0); run Collector(1, 2)
        :: scene == 8 -> /* a repack beside a push of the same tree */
            ref[0] = 0; run Repacker(0, 0, 1); run Pusher(1, 0, 1, 2); run Collector(1, 2)
        :: scene == 9 -> /* a tag of what nothing names any more */
            ref[0] = 0; run Tagger(0, 0, 1, 0); run Collector(1, 3)
        :: scene == 10 -> /* a collector that died, and one that goes on */
            ref[0] = 0; run Tagger(0, 0, 1, 0); run Collector(1, 2); run Collector(2, 2)
        fi
    }
}

// scale_search
